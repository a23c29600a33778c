"""The command line, and which configurations can run."""
