"""Provenance of a run: its record beside the weights, and the verification of that record."""
