"""What surrounds the steps of a run: its folder, resuming, stopping, its screen, its outcome."""
