"""Training data: read sources, prepare them into token stores, and build batches from the stores."""
