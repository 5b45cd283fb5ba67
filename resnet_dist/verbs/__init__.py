"""The subcommands other than `train`. Training imports nothing from this package."""
