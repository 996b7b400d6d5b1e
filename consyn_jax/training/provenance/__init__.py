"""Provenance of a run: recorded beside its weights, checked, and asked about."""
