"""Plan the memory and time of a run on absent machines."""
