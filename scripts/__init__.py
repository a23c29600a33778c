"""Commands for people: one file each, and what only they use."""
