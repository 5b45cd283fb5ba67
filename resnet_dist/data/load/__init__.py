"""From requests to batches on the device: reading, decoding, resizing."""
