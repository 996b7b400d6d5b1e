"""Direct preference optimisation: the loss, and the reference log-probabilities."""
