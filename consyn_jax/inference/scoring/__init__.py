"""Score texts with a model: likelihoods, perplexity, and the choice of answers."""
