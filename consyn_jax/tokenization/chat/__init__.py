"""Conversations as a model writes them: chat templates, and the turns that are learned."""
