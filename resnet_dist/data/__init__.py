"""From files to batches: listing -> index -> order -> augment -> dali."""
