"""Memory and time of a run on machines that are not here."""
