"""Evaluators: what a candidate is worth, from a training, a probe, or without any training."""
