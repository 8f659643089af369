"""Speculative decoding: a draft guesses, the model reads all guesses in one parallel pass.

    p, q    what a token is drawn from: by the model, by the draft, both after the same penalty,
            rule, temperature and filters
    x       a guess, drawn from q

A guess is taken with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw
from max(p - q, 0), normalised. Tokens are then distributed as if drawn from p, whatever q is. It
works for every model, for a state is a value: going back to one is keeping it.

Source: Leviathan et al. 2023, arXiv:2211.17192, section 2.3 and appendix A.1.
Differs: the rows of a batch keep in step: each takes as many guesses as the row that takes fewest,
    which leaves every row's distribution as it is. After a rejection the model goes back to the
    last state that holds nothing wrong, and reads what came since along with the next guesses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import GenerateError
from kizzasi.models.decoding.reading import check_model, read, vocabulary
from kizzasi.models.decoding.sampling import invert, require
from kizzasi.models.decoding.transcript import Decoded, Run, Transcript

if TYPE_CHECKING:
    from kizzasi.models.decoding.sampling import Seen
    from kizzasi.models.model import ModelOutput, SequenceModel
    from kizzasi.models.state import ModelState


class Guesses(NamedTuple):
    """ids (b, k); q (b, k, v) what each was drawn from; seen after 0 to k of them; states of the
    draft after 0 to k - 1 of them."""

    ids: Tensor
    q: Tensor
    seen: list[Seen]
    states: list[ModelState]


class Guesser(NamedTuple):
    """A draft, its state, and the (b, 1 or 2) tokens it has not read yet."""

    model: SequenceModel
    state: ModelState
    unread: Tensor

    @classmethod
    def begin(
        cls, draft: SequenceModel, target: SequenceModel, rows: Tensor, mask: Tensor | None
    ) -> Guesser:
        """A draft that has read the prompts; raises GenerateError if it knows other tokens."""
        check_model(draft, "a draft")
        theirs, ours = vocabulary(draft), vocabulary(target)
        require(theirs == ours, "draft", f"of the model's vocabulary {ours}, not {theirs}")
        return cls(draft, read(draft, rows, mask, None)[1], rows[:, :0])

    def guess(self, run: Run, seen: Seen, n: int) -> Guesses:
        """Draw n tokens in a row."""
        out = self._read(self.unread, self.state)
        ids, q, after, states = [], [], [seen], [out.state]
        while True:
            logits = run.sampling.logits(out.logits.flatten(0, -2), after[-1])
            q.append(run.sampling.probabilities(logits))
            guess, sound = invert(q[-1], run.draws.next())
            if not (sound & logits.amax(-1).isfinite()).all():
                raise GenerateError(
                    "draft: its logits are NaN or infinite; decode without it, or find out where "
                    "they come from with draft(prompt)"
                )
            ids.append(guess)
            after.append(after[-1].add(guess))
            if len(ids) == n:
                return Guesses(torch.stack(ids, 1), torch.stack(q, 1), after, states)
            out = self.model.step(guess, out.state)
            states.append(out.state)

    def advance(self, guesses: Guesses, n_right: int, last: Tensor) -> Guesser:
        """Keep n_right guesses; `last` (b,) comes after them."""
        last = last[:, None]
        if n_right == guesses.ids.shape[1]:  # the last guess was never read
            unread = torch.cat([guesses.ids[:, -1:], last], 1)
            return self._replace(state=guesses.states[-1], unread=unread)
        return self._replace(state=guesses.states[n_right], unread=last)

    def _read(self, ids: Tensor, state: ModelState) -> ModelOutput:
        if ids.shape[1] == 1:
            return self.model.step(ids[:, 0], state)
        return self.model(ids, state, last_only=True)


def speculate(run: Run, guesser: Guesser, n_drafted: int) -> Decoded:
    """Decode with guesses, n_drafted of them at a time.

    The state of the result is not given: where rows have finished it is of no use.
    """
    transcript, sampling, seen = Transcript(run), run.sampling, run.seen
    ids, sound = sampling.pick(sampling.logits(run.logits, seen), run.draws)
    ids = transcript.add(ids, sound, run.logits)
    seen, state, unread = seen.add(ids), run.state, ids[:, None]
    guesser = guesser._replace(unread=unread)
    while not transcript.finished:
        n = min(n_drafted, run.max_new_tokens - len(transcript.ids))
        guesses = guesser.guess(run, seen, n)
        out = run.model(torch.cat([unread, guesses.ids], 1), state)
        logits = out.logits[:, unread.shape[1] - 1 :]
        n_right, last, sound = _judge(run, guesses, logits, transcript.done)
        taken = [*guesses.ids[:, :n_right].unbind(1), last]
        for i, ids in enumerate(taken):
            if not transcript.finished:
                transcript.add(ids, sound, logits[:, i])
        seen = guesses.seen[n_right].add(last)
        guesser = guesser.advance(guesses, n_right, last)
        if n_right == n:
            state, unread = out.state, last[:, None]
            continue
        unread = torch.cat([unread, torch.stack(taken, 1)], 1)
        if unread.shape[1] > 2 * n_drafted + 1:  # else every pass would read more than the last
            state = run.model(unread[:, :-1], state, last_only=True).state
            unread = unread[:, -1:]
    return transcript.decoded()


def _judge(
    run: Run, guesses: Guesses, logits: Tensor, done: Tensor | None
) -> tuple[int, Tensor, Tensor]:
    """Take guesses and choose the token after them.

    Args:
        logits: (b, n + 1, v), the model's own at every guess and after the last.
        done: (b,) rows whose tokens no longer matter; None if there are none.

    Returns:
        How many guesses every row takes, (b,) the token after them, (b,) whether the logits read
        were sound.
    """
    n = guesses.ids.shape[1]
    made = [run.sampling.logits(logits[:, i], guesses.seen[i]) for i in range(n + 1)]
    p = torch.stack([run.sampling.probabilities(each) for each in made], 1)
    at = guesses.ids[..., None]
    u = torch.stack([run.draws.next() for _ in range(n)], 1).to(p.dtype)
    right = u * guesses.q.gather(-1, at)[..., 0] < p[:, :n].gather(-1, at)[..., 0]
    each = right.long().cumprod(1).sum(1)
    each = each if done is None else each.masked_fill(done, n)
    n_right = int(each.min())
    sound = torch.stack([one.amax(-1) for one in made[: n_right + 1]], 1).isfinite().all(1)
    left = p[:, n_right]
    if n_right < n:
        rest = (left - guesses.q[:, n_right]).clamp(min=0)
        left = torch.where(rest.sum(-1, keepdim=True) > 0, rest, left)
    drawn, whole = invert(left, run.draws.next())
    if n_right < n:  # some rows took the next guess too
        drawn = torch.where(right[:, n_right], guesses.ids[:, n_right], drawn)
    return n_right, drawn, sound & whole
