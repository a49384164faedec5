"""Everything that happens to a job: resolving, running, replaying, estimating."""
