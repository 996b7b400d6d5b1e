"""Generate text with a trained model: continuations of prompts, and conversations."""
