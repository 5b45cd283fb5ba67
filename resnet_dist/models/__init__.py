"""Networks. `depths` is free of torch, so that a config can be checked on a login node."""
