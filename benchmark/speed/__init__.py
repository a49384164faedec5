"""How fast an attack step is and how much memory it takes: a developer's tool, not in the wheel.

Every time is compared with a reference that is measured in the same run, so that a drift of the
machine's speed cancels.
"""
