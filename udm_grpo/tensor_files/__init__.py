"""Files of tensors, read and written without torch, and the names of the tensors in them."""
