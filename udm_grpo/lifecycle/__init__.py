"""A run from its start to its end: identity, what may change when it continues, signals, endings."""
