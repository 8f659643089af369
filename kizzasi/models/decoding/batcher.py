"""Continuous batching: requests of unequal length come and go between the steps of one batch.

A row is a request that is being decoded. Its logits, draws and endings are those of a `generate` of
its own; the rows share nothing but the model's step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kizzasi.errors import GenerateError
from kizzasi.models.decoding.generate import Generated, outcome, state_after
from kizzasi.models.decoding.own_cache import own
from kizzasi.models.decoding.reading import as_rows, check_model, evaluating, read, vocabulary
from kizzasi.models.decoding.sampling import Draws, Sampling, Seen, integer, require
from kizzasi.models.decoding.transcript import Run, Stopping, Transcript
from kizzasi.models.state import join_states

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel
    from kizzasi.models.state import ModelState


@dataclass(frozen=True)
class Request:
    """What `Batcher.add` was asked for; rows (1, t)."""

    ticket: int
    rows: Tensor
    flat: bool
    max_new_tokens: int
    state: ModelState | None
    sampling: Sampling
    stopping: Stopping
    seed: int | torch.Generator
    return_state: bool
    return_logprobs: bool


class Row:
    """A request that is being decoded, after its prompt: logits (1, v) and state of one row."""

    def __init__(
        self, model: SequenceModel, request: Request, logits: Tensor, state: ModelState
    ) -> None:
        self.request = request
        self.run = Run(
            model=model,
            step=model.step,
            logits=logits,
            state=state,
            seen=Seen.begin(request.sampling, request.rows, None, logits.shape[-1]),
            sampling=request.sampling,
            draws=Draws(request.seed, 1, logits.device),
            stopping=request.stopping,
            max_new_tokens=request.max_new_tokens,
            on_token=None,
            with_logprobs=request.return_logprobs,
        )
        self.seen, self.transcript = self.run.seen, Transcript(self.run)

    def choose(self, logits: Tensor) -> Tensor:
        """The next id (1,) by the model's logits (1, v)."""
        sampling = self.request.sampling
        ids, sound = sampling.pick(sampling.logits(logits, self.seen), self.run.draws)
        ids = self.transcript.add(ids, sound, logits)
        self.seen = self.seen.add(ids)
        return ids

    def finish(self, state: ModelState) -> Generated:
        """All of it; the state, of this row, has read all but the last token."""
        out = self.transcript.decoded(state)
        after = state_after(self.run, out) if self.request.return_state else None
        return outcome(self.request.rows, out, after, self.request.flat)


class Batcher:
    """Decodes many requests at once; a finished row makes room for the next in line.

    Every row gets what `generate` alone would give it, up to rounding. Modes of the model's modules
    stay as they are.

    Args:
        model: a causal model with a token stem.
        max_rows: how many are decoded at once; others wait, first come, first served.

    Attributes:
        finished: `Generated` by ticket, to be taken out at will.
        failed: the error by ticket of rows whose logits were NaN or infinite; the others go on.
    """

    def __init__(self, model: SequenceModel, *, max_rows: int = 16) -> None:
        check_model(model, "a batcher")
        require(integer(max_rows) and max_rows >= 1, "max_rows", "an integer from 1 on")
        self.model, self.max_rows = model, max_rows
        self.finished: dict[int, Generated] = {}
        self.failed: dict[int, GenerateError] = {}
        self._waiting: deque[Request] = deque()
        self._rows: list[Row] = []
        self._state: ModelState | None = None  # of all rows, in their order, ids not yet read
        self._ids: Tensor | None = None  # (b,) the last of every row
        self._n_added = 0

    def add(
        self,
        prompt: Tensor | Sequence[Any],
        max_new_tokens: int,
        *,
        state: ModelState | None = None,
        sampling: Sampling | None = None,
        eos: int | Sequence[int] | Tensor | None = None,
        stop: str | Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        seed: int | torch.Generator = 0,
        return_state: bool = False,
        return_logprobs: bool = False,
    ) -> int:
        """Ask for the continuation of one prompt; it is read when there is room.

        Args:
            prompt: ids (t,) or (1, t).
            sampling: how its tokens are chosen; None as `generate` does by default.
            max_new_tokens, state, eos, stop, decode, seed, return_state, return_logprobs: as for
                `generate`. A generator should serve one request alone.

        Returns:
            A ticket, under which the result is kept.

        Raises:
            GenerateError: an argument is out of range, or the prompt has several rows.
            ShapeError: the prompt does not fit the model.
        """
        sampling = Sampling() if sampling is None else sampling
        sampling.check()
        wanted = integer(max_new_tokens) and max_new_tokens >= 1
        require(wanted, "max_new_tokens", f"an integer from 1 on, not {max_new_tokens!r}")
        stopping = Stopping.of(eos, stop, decode, vocabulary(self.model))
        rows, flat = as_rows(prompt)
        self.model.stem.check(rows, time=True)
        require(len(rows) == 1, "prompt", f"one row, not {len(rows)}; add each for itself")
        ticket, self._n_added = self._n_added, self._n_added + 1
        self._waiting.append(
            Request(
                ticket,
                rows,
                flat,
                max_new_tokens,
                state,
                sampling,
                stopping,
                seed,
                return_state,
                return_logprobs,
            )
        )
        return ticket

    def step(self) -> dict[int, int]:
        """Admit who waits, as far as there is room, and choose one token of every row.

        Returns:
            The new token by ticket.
        """
        with evaluating(self.model):
            logits = self._advance()
            logits = self._admit(logits)
            return {} if logits is None else self._choose(logits)

    def run(self) -> dict[int, Generated]:
        """Step until every request is finished. Returns `finished`, which it empties.

        Raises the first of `failed`, if there is one, and leaves `finished` alone.
        """
        while self._rows or self._waiting:
            self.step()
        for ticket in self.failed:
            raise GenerateError(f"request {ticket}: {self.failed[ticket]}")
        done, self.finished = self.finished, {}
        return done

    def cancel(self, ticket: int) -> None:
        """Forget a request that waits or is being decoded; else GenerateError is raised."""
        for request in self._waiting:
            if request.ticket == ticket:
                self._waiting.remove(request)
                return
        kept = [i for i, row in enumerate(self._rows) if row.request.ticket != ticket]
        require(len(kept) < len(self._rows), "ticket", f"of a request in work, not {ticket}")
        with torch.no_grad():
            self._keep(kept)

    @property
    def n_rows(self) -> int:
        """How many requests are being decoded."""
        return len(self._rows)

    def _advance(self) -> Tensor | None:
        """Logits (b, v) after each row's last token."""
        if self._state is None or self._ids is None:
            return None
        logits, self._state, *_ = self.model.step(self._ids, self._state)
        return logits

    def _admit(self, logits: Tensor | None) -> Tensor | None:
        """Read prompts into free rows. Returns the logits of all rows, None if there are none."""
        old = [] if logits is None or self._state is None else [(logits, self._state)]
        new = []
        while self._waiting and len(self._rows) < self.max_rows:
            request = self._waiting.popleft()
            first, state = read(self.model, request.rows, None, request.state)
            self._rows.append(Row(self.model, request, first, state))
            new.append((first, state))
        if new:
            self._state = own(join_states([state for _, state in old + new]))
            logits = torch.cat([each for each, _ in old + new])
        return logits

    def _choose(self, logits: Tensor) -> dict[int, int]:
        chosen: dict[int, int] = {}
        ids, kept = [], []
        for i, row in enumerate(self._rows):
            ticket = row.request.ticket
            try:
                ids.append(row.choose(logits[i : i + 1]))
                chosen[ticket] = int(ids[-1])
                if row.transcript.finished:
                    self.finished[ticket] = row.finish(self._only(i))
                else:
                    kept.append(i)
            except GenerateError as error:
                self.failed[ticket] = error
                ids.append(logits.new_zeros(1, dtype=torch.int64))
        self._ids = torch.cat(ids)
        self._keep(kept)
        return chosen

    def _only(self, row: int) -> ModelState:
        assert self._state is not None
        return self._state.gather(torch.tensor([row], device=self._state.position.device))

    def _keep(self, kept: list[int]) -> None:
        """Evict all rows but these."""
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        if not kept or self._state is None or self._ids is None:
            self._state = self._ids = None
            return
        index = torch.tensor(kept, device=self._state.position.device)
        self._state, self._ids = self._state.gather(index), self._ids[index]
