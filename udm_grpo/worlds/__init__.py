"""Small worlds that a laptop trains on: their prompts, pictures and base checkpoints."""
