"""--compile-only: compile the programs of a run for devices that need not be present."""
