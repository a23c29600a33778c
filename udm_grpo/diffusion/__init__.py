"""The probability path, its sampler and the pre-training loss."""
