"""The ladder: small models in several sizes, whose losses predict those of larger ones."""
