"""The checks of `consyn-doctor`: facts of a machine, and pure functions that judge them."""
