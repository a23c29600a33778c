"""The process that holds the scorers: images and prompts in, rewards out. It imports neither jax nor udm_grpo."""
