"""The commands: one thin module each, from argv to configuration to call."""
