"""Recognition of splits, files beside the data and missed separators, by names and contents."""
