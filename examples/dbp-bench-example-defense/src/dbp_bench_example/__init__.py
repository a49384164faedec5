"""An example of a defense outside dbp-bench."""
