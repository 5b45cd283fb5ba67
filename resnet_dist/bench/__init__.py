"""Measurements: what a user can repeat with `resnet-dist bench`."""
