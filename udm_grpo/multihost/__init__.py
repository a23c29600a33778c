"""Several processes as one run: how they find, recognise and lose each other, and what they share."""
