"""Render conversations with chat templates, and find the turns to train on."""
