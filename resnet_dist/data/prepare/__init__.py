"""Prepares data sets: sources -> (reencode) -> write_shards; and digits."""
