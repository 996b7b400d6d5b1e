"""Generation: a static cache of keys and values, and slots that each extend one text."""
