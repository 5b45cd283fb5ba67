"""From files to batches: index (what there is), view (how it is seen), load (its pixels)."""
