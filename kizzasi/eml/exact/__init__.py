"""Exact EML trees: compiled from expressions, or recovered from samples."""
