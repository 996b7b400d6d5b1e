"""The run directory: identity, lock, opening, and export of models."""
