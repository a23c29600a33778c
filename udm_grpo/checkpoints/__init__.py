"""The checkpoints of training, on Orbax: saved, found again, read."""
