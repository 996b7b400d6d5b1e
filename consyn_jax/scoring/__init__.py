"""Requests with known answers: score a request's choices, and judge answers of the model."""
