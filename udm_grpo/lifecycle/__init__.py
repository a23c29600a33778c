"""The lifecycle of a run: its identity, what may change on resume, signals, and how it ends."""
