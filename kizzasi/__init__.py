"""kizzasi: sequence models in PyTorch, with architecture search."""

__version__ = "0.1.0"
