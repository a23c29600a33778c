"""Reward scorers in processes of their own: images and prompts in, scores out. Imports neither jax nor udm_grpo."""
