"""UDM-GRPO: reinforcement learning of uniform discrete diffusion models for text-to-image, in JAX."""
