"""Measurements of the time and memory of an attack step: a developer's tool, not in the wheel.

Every time is compared with a reference that is measured in the same run, so that a drift of the
machine's speed cancels.
"""
