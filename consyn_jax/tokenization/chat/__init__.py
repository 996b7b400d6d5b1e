"""Conversations as model text: chat templates, and the turns that are trained on."""
