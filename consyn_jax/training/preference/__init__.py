"""Direct preference optimisation: its loss, and the log-probabilities that it compares with."""
