"""Several processes as one run: how they connect, authenticate and end, and the arrays that they share."""
