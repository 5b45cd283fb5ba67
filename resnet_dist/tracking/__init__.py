"""What a run records, and where it is shown."""
