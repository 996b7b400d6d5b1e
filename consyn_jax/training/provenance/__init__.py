"""Provenance: the record of a run's inputs, stored with the weights, and its verification."""
