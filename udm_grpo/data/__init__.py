"""Prompts: raw files, prepared sets, GenEval's grammar, the order in which they are drawn, and their token ids."""
