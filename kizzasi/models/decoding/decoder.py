"""A model with a state that nobody else holds, written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kizzasi.errors import GenerateError, ShapeError, SpecError
from kizzasi.models.decoding.inplace import CalledLine, Line, Products, begin
from kizzasi.models.decoding.reading import as_mask, evaluating, read

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel
    from kizzasi.models.state import ModelState


class Decoder:
    """Steps a model with a state of its own, written in place; no gradients, modes stay.

    On a CPU, one to four rows go through all layers that can be written so as one program of C
    (`repr` says how many); for others up to 256 MiB of weights are laid out anew. Weights that are
    trained, loaded or replaced in between act from the next token on. `generate` does all that by
    itself; this is for a loop of one's own:

        decoder = Decoder(model)
        logits = decoder.read(prompt)
        while ...:
            logits = decoder.step(choose(logits))

    Args:
        model: a causal model.
        state: what is continued, and left as it is; None starts afresh with the first `read`.
        compile: a mode of `torch.compile`, such as "default", for which every step is compiled as a
            whole and takes its state as a value: states of one shape only, so not caches of
            attention without a window. It pays after thousands of tokens. On CUDA
            "reduce-overhead" records a step as one graph of kernels.

    Raises:
        SpecError: the model is not causal, or to be compiled and its state grows.
    """

    def __init__(
        self,
        model: SequenceModel,
        state: ModelState | None = None,
        *,
        compile: str | None = None,
    ) -> None:
        model.require_causal("a decoder")
        self.model = model
        self._modules = list(model.modules())
        self._products = Products()
        if compile is not None and model.spec.cost(1).state_bytes < model.spec.cost(2).state_bytes:
            raise SpecError(
                "compile: the state grows by every token, and every shape would be compiled anew; "
                "give attention a window, or leave compile out"
            )
        self._compiled = None if compile is None else torch.compile(model.step, mode=compile)
        self._line: Line | None = None if state is None else self._begin(state)

    def read(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read many tokens (b, t), or frames (b, t, n_in), at once.

        Args:
            mask: (b, t), False for left padding, also after earlier tokens.

        Returns:
            (b, v) logits after the last one.
        """
        mask = None if mask is None else as_mask(mask, inputs)
        with evaluating(self.model):
            before = None if self._line is None else self._line.value()
            logits, state = read(self.model, inputs, mask, before)
            self._line = self._begin(state)
        return logits

    def step(self, inputs: Tensor) -> Tensor:
        """Read one token (b,), or frame (b, n_in), of each row. Returns (b, v) logits after it."""
        self.model.stem.check(inputs, time=False)
        if any(module.training for module in self._modules):
            with evaluating(self.model):
                return self._ready(len(inputs)).step(inputs)
        with torch.no_grad():
            return self._ready(len(inputs)).step(inputs)

    def fork(self) -> ModelState:
        """The state as a value: a copy that later steps leave alone, for another decoder, a beam,
        or a file. Raises GenerateError before the first token."""
        if self._line is None:
            raise GenerateError("fork: no token was read yet; call read or step first")
        with torch.no_grad():
            return self._line.value()

    def gather(self, rows: Tensor) -> None:
        """Go on with these rows, repeated or reordered at will."""
        if self._line is None:
            raise GenerateError("gather: no token was read yet; call read or step first")
        with torch.no_grad():
            self._line = self._begin(self._line.value().gather(rows))

    def __repr__(self) -> str:
        if self._line is None:
            return "Decoder(no token was read yet)"
        engines = self._line.engines
        counts = {name: engines.count(name) for name in sorted(set(engines))}
        names = "+".join(counts) or "torch"
        return f"Decoder(engine={names}, layers {counts}, {self._line.rows} rows)"

    def _begin(self, state: ModelState) -> Line:
        if self._compiled is not None:
            return CalledLine(self._compiled, state)
        return begin(self.model, state, self._products)

    def _ready(self, batch: int) -> Line:
        line = self._line
        if line is None:
            line = self._begin(self.model.init_state(batch))
        elif not line.holds():
            line = self._begin(line.value())
        elif batch != line.rows:
            raise ShapeError(f"inputs: {batch} rows, and the decoder goes on with {line.rows}")
        self._line = line
        return line
