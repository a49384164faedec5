"""Speed, memory and precision of attack steps, measured against references within one run."""
