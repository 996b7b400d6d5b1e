"""A run as it goes on: its history in bounded memory, its time by activity, its page."""
