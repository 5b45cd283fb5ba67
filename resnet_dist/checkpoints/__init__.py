"""What a checkpoint holds, where checkpoints stand, and how one is written."""
