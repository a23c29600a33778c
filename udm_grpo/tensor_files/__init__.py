"""Read and write files of tensors without torch, and map the names of the tensors in them."""
