"""From result files alone to numbers, tables and pages; nothing here runs a network."""
