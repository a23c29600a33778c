"""Training logs: metrics, pictures, the run folder and the report."""
