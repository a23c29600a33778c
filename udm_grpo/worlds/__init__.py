"""Small worlds that a laptop can train on: their prompts, images and base models."""
