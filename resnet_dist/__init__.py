"""Deep residual learning (He et al. 2015) as a distributed training system."""

__version__ = "0.1.0"
