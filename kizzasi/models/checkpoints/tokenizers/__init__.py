"""Text to ids and back, with what lies beside a checkpoint."""

from kizzasi.models.checkpoints.tokenizers.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    WorldTokenizer,
    load_tokenizer,
)

__all__ = ["ByteTokenizer", "Tokenizer", "WorldTokenizer", "load_tokenizer"]
