"""Checks of a defense, of its gradient and of an installation."""
