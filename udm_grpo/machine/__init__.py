"""This machine: its GPUs and its terminal."""
