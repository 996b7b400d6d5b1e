"""Search for hyperparameters: studies whose trials share compiled programs and data."""
