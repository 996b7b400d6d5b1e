"""Uses of a trained model: find and load it, generate, evaluate, convert."""
