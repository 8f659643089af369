"""Optimisers without gradients, for any module: coordinate descent, secants, evolution."""
