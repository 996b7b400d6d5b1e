"""The ladder: train small models of several sizes, and predict the losses of larger models."""
