"""Data sets made ready: sources -> (reencode) -> write_shards; and digits."""
