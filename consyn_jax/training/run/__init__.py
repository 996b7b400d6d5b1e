"""The run directory: its identity, its lock, opening it, and exporting models to it."""
