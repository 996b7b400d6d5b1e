"""The commands, one module each: parse argv into a configuration, then call the library."""
