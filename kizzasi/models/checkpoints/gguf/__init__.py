"""GGUF, the files of llama.cpp: container, packed numbers, architectures, vocabularies."""

from kizzasi.models.checkpoints.gguf.model import NAME, is_gguf, read, recognise, write

__all__ = ["NAME", "is_gguf", "read", "recognise", "write"]
