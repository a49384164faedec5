"""Declarations in YAML, and the objects that are built from them."""
