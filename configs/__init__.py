"""Configurations: each file is a runnable page with get_config() -> RunConfig."""
