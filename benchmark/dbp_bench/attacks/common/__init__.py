"""The parts that attacks share: losses, and the view that third-party attacks are given."""
