"""Requests with known answers: reading them, scoring their answers, and judging generated ones."""
