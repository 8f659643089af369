"""RWKV's World vocabulary: every token is some bytes, and a text is cut into the longest that fit.

It stands in a text file, one token a line: its id, a literal of Python, its length in bytes; and in
GGUF as a list of such literals without their quotes. Ids that no line has are no tokens.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from kizzasi.errors import CheckpointError, DataError

FILE = "rwkv_vocab_v20230424.txt"
MAX_LINE = 4096


class World:
    """The tokens by id. Ids without one decode to nothing.

    Raises:
        CheckpointError: an empty token, or one that two ids have.
    """

    def __init__(self, tokens: Mapping[int, bytes], where: str) -> None:
        self.tokens, self.ids = dict(tokens), {token: i for i, token in tokens.items()}
        if len(self.ids) < len(self.tokens) or b"" in self.ids:
            raise CheckpointError(f"{where}: a token is empty or there twice; damaged")
        lengths: dict[int, set[int]] = {}
        for token in self.ids:
            lengths.setdefault(token[0], set()).add(len(token))
        # Of the tokens that begin with a byte, the longest first.
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        """Raises DataError where no token fits."""
        data, at, ids = text.encode(), 0, list[int]()
        while at < len(data):
            for length in self._lengths.get(data[at], ()):
                found = self.ids.get(data[at : at + length])
                if found is not None:
                    ids.append(found)
                    at += length
                    break
            else:
                rest = data[at : at + 20]
                raise DataError(f"{text!r:.60}: the vocabulary has no token for {rest!r}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Incomplete UTF-8 becomes U+FFFD."""
        return b"".join(self.tokens.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def to_file(self) -> bytes:
        """The text file."""
        lines = (f"{i} {token!r} {len(token)}\n" for i, token in sorted(self.tokens.items()))
        return "".join(lines).encode()

    def to_gguf(self, vocab_size: int) -> list[str | None]:
        """The literals of all ids; None where there is no token."""
        return [repr(self.tokens[i])[2:-1] if i in self.tokens else None for i in range(vocab_size)]


def from_file(content: bytes, where: str) -> World:
    """Read the text file. Raises CheckpointError."""
    tokens: dict[int, bytes] = {}
    try:
        for line in content.decode().splitlines():
            number, _, rest = line.partition(" ")
            literal, _, size = rest.rpartition(" ")
            if len(line) > MAX_LINE:
                raise ValueError(f"a line of {len(line)} characters")
            token = ast.literal_eval(literal)
            token = token.encode() if isinstance(token, str) else token
            if not isinstance(token, bytes) or len(token) != int(size) or int(number) in tokens:
                raise ValueError(f"{line!r:.80}")
            tokens[int(number)] = token
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a vocabulary of RWKV: {error}") from error
    return World(tokens, where)


def from_literals(literals: Mapping[int, str], where: str) -> World:
    """Read the list of a GGUF file. Raises CheckpointError."""
    try:
        tokens = {
            i: text.encode("ascii").decode("unicode_escape").encode("latin-1")
            for i, text in literals.items()
        }
    except UnicodeError as error:
        raise CheckpointError(f"{where}: not a vocabulary of RWKV: {error}") from error
    return World(tokens, where)
