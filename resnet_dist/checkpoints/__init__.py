"""Checkpoints: their content, their folders, and how they are written."""
