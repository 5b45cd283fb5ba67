"""From files to batches: index (which images), view (their order and crops), load (pixels)."""
