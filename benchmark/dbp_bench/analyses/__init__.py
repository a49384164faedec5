"""Analyses of where robustness comes from, after the figures of the papers on purification."""
