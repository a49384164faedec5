"""The page of a track: one HTML file that needs nothing else."""

from dbp_bench.reporting.page.page import load_samples, to_html

__all__ = ["load_samples", "to_html"]
