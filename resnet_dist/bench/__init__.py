"""The benchmarks of `resnet-dist bench`."""
