"""Generation: a static cache of keys and values, and slots in which texts grow token by token."""
