"""Plan the memory and time of a run for machines that are not at hand."""
