"""Requests with known answers: read them, score given answers, and judge generated answers."""
