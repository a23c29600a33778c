"""The networks: the URSA transformer and the VQ image tokenizer. The only package that imports flax."""
