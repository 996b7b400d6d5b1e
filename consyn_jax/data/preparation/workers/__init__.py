"""Processes that turn blocks into tokens: on this machine, or on a Ray cluster."""
