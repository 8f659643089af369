"""EmlModel: eml-core's general-purpose regressor, a fixed trunk of EML nodes with several heads.

Glossary (eml-core's levels):
    level 0   8 nodes  a_i = softmax3(p) . (1, x_j, x_k),  (j, k) cycling through the inputs
    level 1   4 nodes  b_i = eml_safe(a_2i, a_2i+1)
    mix3      4 nodes  eml_safe of two softmax3 mixtures of the level below (depths 4 and 5)
    mix4      2 nodes  eml_safe of two affine mixtures of the level below (depths 3, 4, 5)
    heads     eml_safe of two affine mixtures of the first two trunk values, at least 0
    P, S      candidates and samples evaluated together
"""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.eml.core.events import EmlEventLog, Event, Trained
from kizzasi.eml.core.fields import Fields, write
from kizzasi.eml.core.rng import Lcg, Rng
from kizzasi.eml.operator import eml_safe
from kizzasi.eml.search.coordinate import ListedDescent
from kizzasi.eml.search.minimize import minimize
from kizzasi.eml.search.objective import Loss
from kizzasi.errors import ShapeError, SpecError

_NODES, _LEVEL0 = 8, 24
_DELTAS = (-0.1, -0.01, -0.001, 0.001, 0.01, 0.1)
_MIN_SAMPLES, _CONVERGED = 50, 0.01
_SECONDARY_WEIGHT = 0.3
_TRAIN_SEED, _DISTILL_SEED = 0xDEADBEEFCAFE1234, 0xCAFEBABE12345678
# Per node: the two values mixed on the left (exp) side and the two on the right (ln) side.
_FIRST_MIX3 = ((0, 1, 2, 3), (0, 1, 2, 3), (0, 2, 1, 3), (1, 3, 0, 2))
_SECOND_MIX3 = ((0, 1, 2, 3), (0, 2, 1, 3), (1, 3, 0, 2), (0, 3, 1, 2))
_MIX3 = {2: (), 3: (), 4: (_FIRST_MIX3,), 5: (_FIRST_MIX3, _SECOND_MIX3)}
_MIX4 = {
    2: (),
    3: ((0, 1, 2, 3), (0, 1, 2, 3)),
    4: ((0, 1, 2, 3), (0, 2, 1, 3)),
    5: ((0, 1, 2, 3), (2, 3, 0, 1)),
}


def _left(x: Tensor) -> Tensor:
    return x.clamp(-10.0, 10.0)


def _right(x: Tensor) -> Tensor:
    return x.clamp(0.01, 10.0)


def _mix3(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Mix 1, a and b by softmax weights; logits (..., 3), a and b (..., S)."""
    one, first, second = torch.softmax(logits, -1)[..., None, :].unbind(-1)
    return one + first * a + second * b


def _mix4(weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute w0 + w1 a + (1 - w0 - w1) b; weights (..., 2), a and b (..., S)."""
    w0, w1 = weights[..., None, :].unbind(-1)
    return w0 + w1 * a + (1.0 - w0 - w1) * b


def _count(depth: int, head_count: int) -> int:
    return _LEVEL0 + 12 * len(_MIX3[depth]) + 4 * len(_MIX4[depth]) + 2 * head_count


class EmlModel:
    """eml-core's multi-head EML regressor: 26 to 60 parameters or so, outputs at least 0.

    Its limits are eml-core's: heads see two trunk values only (at depth 2 half of level 0 is
    dead), and inputs beyond the sixteenth are ignored.

    Args:
        depth: 2 to 5.
        input_count, head_count: widths, 1 or more.
        name: for events; "" for a name made of the sizes.
        rng: "seed" for eml-core's half-range random restarts.
        device: where parameters live and training runs.

    Raises:
        SpecError: depth or a width outside its range.

    Source: the Rust crate eml-core, EmlModel.
    """

    def __init__(
        self,
        depth: int,
        input_count: int,
        head_count: int,
        name: str = "",
        rng: Rng = "fixed",
        device: torch.device | str | None = None,
    ) -> None:
        if depth not in _MIX3 or input_count < 1 or head_count < 1:
            raise SpecError(
                f"EmlModel(depth={depth}, input_count={input_count}, head_count={head_count}): "
                "depth must be in 2..=5, the counts at least 1"
            )
        self.depth, self.input_count, self.head_count = depth, input_count, head_count
        self.name = name or f"eml_d{depth}x{input_count}x{head_count}"
        self.rng: Rng = rng
        count = _count(depth, head_count)
        self.params = torch.zeros(count, dtype=torch.float64, device=device)
        self.trained = False
        self.samples: list[tuple[list[float], list[float]]] = []
        self.events = EmlEventLog()

    @property
    def param_count(self) -> int:
        return self.params.numel()

    def predict(self, x: Tensor) -> Tensor:
        """Map (..., input_count) to (..., head_count)."""
        if x.shape[-1:] != (self.input_count,):
            raise ShapeError(f"got {tuple(x.shape)}; the last size must be {self.input_count}")
        flat = x.reshape(-1, self.input_count)
        return self.evaluate(self.params[None], flat)[0].reshape(*x.shape[:-1], self.head_count)

    def evaluate(self, params: Tensor, x: Tensor) -> Tensor:
        """Evaluate many parameter vectors at once: (P, n) and (S, inputs) to (P, S, heads)."""
        pick = torch.arange(2 * _NODES, device=x.device) % self.input_count
        first, second = x[:, pick].T.unflatten(0, (_NODES, 2)).unbind(1)  # (8, S) each
        level = _left(_mix3(params[:, :_LEVEL0].unflatten(1, (_NODES, 3)), first, second))
        values = eml_safe(level[:, 0::2], level[:, 1::2])  # (P, 4, S)
        at = _LEVEL0
        shift = torch.tensor([0.5, -0.5, 0.0], dtype=params.dtype, device=params.device)
        for pairs in _MIX3[self.depth]:
            logits = params[:, at : at + 12].unflatten(1, (4, 3))
            a, b, c, d = (values[:, list(column)] for column in zip(*pairs, strict=True))
            values = eml_safe(_left(_mix3(logits, a, b)), _right(_mix3(logits + shift, c, d)))
            at += 12
        if _MIX4[self.depth]:
            weights = params[:, at : at + 8].unflatten(1, (2, 2, 2))
            a, b, c, d = (values[:, list(each)] for each in zip(*_MIX4[self.depth], strict=True))
            left, right = _mix4(weights[:, :, 0], a, b), _mix4(weights[:, :, 1], c, d)
            values = eml_safe(_left(left), _right(right))
            at += 8
        w = params[:, at:].unflatten(1, (self.head_count, 2))[..., None, :]
        t0, t1 = values[:, 0:1], values[:, 1:2]
        left, right = (w[..., i] * t0 + (1.0 - w[..., i]) * t1 for i in (0, 1))
        return eml_safe(_left(left), _right(right)).clamp_min(0.0).transpose(1, 2)

    def record(self, inputs: list[float], targets: list[float | None]) -> None:
        """Keep one sample; a target of None is left out of the loss.

        Raises:
            ShapeError: wrong lengths.
        """
        if (len(inputs), len(targets)) != (self.input_count, self.head_count):
            raise ShapeError(
                f"got {len(inputs)} inputs and {len(targets)} targets; "
                f"need {self.input_count} and {self.head_count}"
            )
        known = [float("nan") if target is None else target for target in targets]
        self.samples.append((list(inputs), known))

    def train(self, max_sweeps: int = 1000) -> bool:
        """Search by random restarts, then coordinate descent; return whether mse < 0.01.

        Needs 50 samples, or returns False at once. The first head counts fully in the loss, the
        others 0.3. 100 restarts (200 above 40 parameters), then sweeps of the steps +-0.1, +-0.01
        and +-0.001 over every parameter until one changes nothing.

        Source: eml-core's EmlModel::train.
        """
        if len(self.samples) < _MIN_SAMPLES:
            return False
        loss, n, device = self._loss(), self.param_count, self.params.device
        lcg = Lcg(_TRAIN_SEED, self.rng)
        count = 200 if n > 40 else 100
        drawn = [lcg.sample(n) for _ in range(count)]
        restarts = torch.tensor(drawn, dtype=torch.float64, device=device)
        losses = loss(torch.cat((self.params[None], restarts))[None])[0]
        best, before = int(losses.argmin()), float(losses[0])
        point = restarts[best - 1] if best else self.params
        index = torch.arange(n, device=device).repeat_interleave(len(_DELTAS))
        deltas = torch.tensor(_DELTAS, dtype=torch.float64, device=device).repeat(n)
        sweep = ListedDescent(index, deltas, margin=0.0)
        after = float(losses[best])
        for _ in range(max_sweeps):
            found = minimize(loss, sweep, point[None], evaluations=len(index) + 1)
            point, after = found.x[0], float(found.loss)
            if not int(found.state.accepts):
                break
        self.params = point
        self.trained = after < _CONVERGED
        event = Trained(self.name, len(self.samples), before, after, self.trained, n)
        self.events.push(event)
        return self.trained

    def distill(self, target_depth: int, n_samples: int, max_sweeps: int = 1000) -> EmlModel:
        """Train a shallower model on this one's answers to uniform inputs in [0, 1).

        Args:
            target_depth: of the student, below this model's.
            n_samples: at least 50 are drawn.
            max_sweeps: of the student's training.

        Raises:
            SpecError: the student would not be shallower.
        """
        if target_depth >= self.depth:
            raise SpecError(f"target_depth {target_depth} must be below the teacher's {self.depth}")
        device = self.params.device
        student = EmlModel(
            target_depth, self.input_count, self.head_count, rng=self.rng, device=device
        )
        lcg = Lcg(_DISTILL_SEED, "fixed")
        count = max(n_samples, _MIN_SAMPLES)
        inputs = [[lcg.unit() for _ in range(self.input_count)] for _ in range(count)]
        answers = self.predict(torch.tensor(inputs, dtype=torch.float64, device=device))
        for x, y in zip(inputs, answers.tolist(), strict=True):
            student.record(x, y)
        student.train(max_sweeps)
        return student

    def drain_events(self) -> list[Event]:
        """Return the events so far and forget them."""
        return self.events.drain()

    def to_json(self) -> str:
        """Return eml-core's JSON: depth, input_count, head_count, params, trained."""
        sizes = {key: getattr(self, key) for key in ("depth", "input_count", "head_count")}
        fields = sizes | {"params": self.params.tolist(), "trained": self.trained}
        return write(fields)

    @classmethod
    def from_json(cls, text: str) -> EmlModel:
        """Rebuild a model from eml-core's JSON.

        Raises:
            CheckpointError: damaged, or a wrong number of params.
        """
        keys = ("depth", "input_count", "head_count", "params", "trained")
        fields = Fields.parse(text, keys)
        depth, heads = fields.whole("depth", 2, 5), fields.whole("head_count", 1)
        params = fields.numbers("params", _count(depth, heads))
        model = cls(depth, fields.whole("input_count", 1), heads)
        model.params = torch.tensor(params, dtype=torch.float64)
        model.trained = fields.flag("trained")
        return model

    def to(self, device: torch.device | str) -> EmlModel:
        """Move the parameters; training then runs there. Returns the model itself."""
        self.params = self.params.to(device)
        return self

    def _loss(self) -> Loss:
        """The weighted error on the samples, of candidates (R, P, n)."""
        inputs, targets = (
            torch.tensor(each, dtype=torch.float64, device=self.params.device)
            for each in zip(*self.samples, strict=True)
        )
        weight = torch.full_like(targets, _SECONDARY_WEIGHT)
        weight[:, 0] = 1.0
        weight = torch.where(targets.isnan(), 0.0, weight)
        targets = targets.nan_to_num()

        def loss(points: Tensor) -> Tensor:
            answers = self.evaluate(points.flatten(0, 1), inputs)
            error = (answers - targets).square() * weight
            return (error.sum((1, 2)) / weight.sum()).unflatten(0, points.shape[:2])

        return loss
