"""Training checkpoints on Orbax: save, find and read them."""
