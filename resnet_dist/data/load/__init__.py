"""Execution: from bytes to batches on the device."""
