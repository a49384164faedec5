"""Turns result files into numbers, tables and pages; nothing here runs a network."""
