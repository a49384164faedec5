"""Published checkpoints: catalog, download, conversion without running code, and the cache."""
