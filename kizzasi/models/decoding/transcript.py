"""What is chosen token by token: who has finished, who listens, and whether it meant anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import GenerateError
from kizzasi.models.decoding.sampling import Draws, Sampling, Seen, integer, require

if TYPE_CHECKING:
    from kizzasi.models.model import ModelOutput, SequenceModel
    from kizzasi.models.state import ModelState


@dataclass(frozen=True)
class Stopping:
    """When a row has finished; `generate` explains the fields.

    fill: what finished rows go on with, up to the length of the longest.
    """

    eos: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    @classmethod
    def of(
        cls,
        eos: int | Sequence[int] | Tensor | None,
        stop: str | Sequence[str],
        decode: Callable[[list[int]], str] | None,
        vocab_size: int,
    ) -> Stopping:
        """Raises GenerateError for what is neither an id nor a text, or cannot be found."""
        given = eos.tolist() if isinstance(eos, Tensor) else eos
        ids = () if given is None else (given,) if integer(given) else tuple(given)  # pyright: ignore[reportArgumentType]
        known = all(integer(i) and 0 <= i < vocab_size for i in ids)
        require(known, "eos", f"an id below {vocab_size}, or several; got {eos}")
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        require(all(isinstance(s, str) and s for s in texts), "stop", "one or more texts")
        require(not texts or decode is not None, "decode", "given, to find stop in the text")
        return cls(tuple(int(i) for i in ids), texts, decode)

    @property
    def watches(self) -> bool:
        """Whether a row may finish before it has all its tokens."""
        return bool(self.eos or self.stop)

    @property
    def fill(self) -> int:
        return self.eos[0] if self.eos else 0

    def ends(self, ids: list[int]) -> bool:
        """Whether a continuation, which went on until its last id, is finished by that."""
        if ids[-1] in self.eos:
            return True
        if self.decode is None or not self.stop:
            return False
        text = self.decode(ids)
        return any(s in text for s in self.stop)


class Run(NamedTuple):
    """A model that has read the prompts, and how they go on.

    logits (b, v) of the next token and state are the model's own; `sampling.logits` makes of them
    what is drawn from.
    """

    model: SequenceModel
    step: Callable[[Tensor, ModelState], ModelOutput]
    logits: Tensor
    state: ModelState
    seen: Seen
    sampling: Sampling
    draws: Draws
    stopping: Stopping
    max_new_tokens: int
    on_token: Callable[[Tensor], object] | None
    with_logprobs: bool


class Decoded(NamedTuple):
    """New ids (b, n), how many of them are each row's own, log p (b, n) if asked for, and where
    there is one, a state that has read all but the last, or one `after` all."""

    ids: Tensor
    lengths: list[int]
    logprobs: Tensor | None = None
    state: ModelState | None = None
    after: ModelState | None = None


class Transcript:
    """The tokens of a run.

    The device is waited for once a token, and only where someone waits for it anyway: the CPU, the
    stopping, a listener. Elsewhere NaN logits are noticed at the end.

    Attributes:
        ids: the (b,) tokens so far.
        done: (b,) bool, which rows have finished; None as long as none has.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.stopping = run, run.stopping
        self.b, self.device = len(run.logits), run.logits.device
        self.ids: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.unsound: Tensor | None = None
        self.done: Tensor | None = None
        self.rows: list[list[int]] = [[] for _ in range(self.b)]  # each row's own, if someone waits
        self.live = set(range(self.b))
        self.waits = self.stopping.watches or run.on_token is not None or self.device.type == "cpu"

    def add(self, ids: Tensor, sound: Tensor, logits: Tensor) -> Tensor:
        """Note one more id (b,) of each row, chosen by the model's own logits (b, v), and whether
        they were `sound` (b,).

        Returns:
            The ids, finished rows filled up.
        """
        if self.run.with_logprobs:
            p = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            self.logprobs.append(p if self.done is None else p.masked_fill(self.done, 0.0))
        if self.done is not None:
            ids = ids.masked_fill(self.done, self.stopping.fill)
        self.ids.append(ids)
        if self.waits:
            self._note(ids.tolist(), sound.tolist())
        else:
            self.unsound = ~sound if self.unsound is None else self.unsound | ~sound
        if self.run.on_token is not None:
            self.run.on_token(ids.clone())
        return ids

    @property
    def finished(self) -> bool:
        return len(self.ids) >= self.run.max_new_tokens or not self.live

    def decoded(self, state: ModelState | None = None) -> Decoded:
        """All of it; raises GenerateError for a row whose logits were NaN or infinite."""
        if self.unsound is not None and self.unsound.any():
            raise unsound(int(self.unsound.nonzero()[0]))
        ids = torch.stack(self.ids, 1)
        lengths = [len(row) for row in self.rows] if self.waits else [ids.shape[1]] * self.b
        p = torch.stack(self.logprobs, 1).float() if self.logprobs else None
        return Decoded(ids, lengths, p, state)

    def _note(self, ids: list[int], sound: list[bool]) -> None:
        ended, watches = [], self.stopping.watches
        for row in self.live:
            if not sound[row]:
                raise unsound(row, len(self.ids))
            self.rows[row].append(ids[row])
            if watches and self.stopping.ends(self.rows[row]):
                ended.append(row)
        if ended:
            self.live -= {*ended}
            done = [row not in self.live for row in range(self.b)]
            self.done = torch.tensor(done, device=self.device)


def unsound(row: int, token: int | None = None) -> GenerateError:
    """What to raise for a row whose logits leave nothing to choose from."""
    place = "" if token is None else f" at new token {token}"
    return GenerateError(
        f"row {row}: its logits are NaN, infinite or all forbidden{place}; look for such values in "
        "the weights, the given state and what `process` returns, or decode in a wider dtype"
    )
