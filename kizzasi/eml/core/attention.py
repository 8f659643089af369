"""eml-core's toy attention and its affine twin: same interface, limits, JSON and training."""

import json
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kizzasi.eml.core.events import Event, Trained
from kizzasi.eml.core.incremental import IncrementalTrials
from kizzasi.eml.core.rng import Lcg, Rng
from kizzasi.eml.core.tree import SafeTree, parse_json, tree_from_dict, tree_to_dict
from kizzasi.eml.core.trials import (
    EndToEndTrainConfig,
    FlatAttention,
    PlainTrials,
    descend,
    draw_trials,
)
from kizzasi.eml.core.walk import Walk
from kizzasi.errors import CheckpointError, ShapeError, SpecError

MAX_SEQ_LEN = 8
MAX_D_MODEL = 32
BUFFER_SIZE = 256
MIN_SAMPLES = 4
_EML_SEED, _AFFINE_SEED = 0x6D6174746861777F, 0x426C696E65537465
_INIT_SCALE = 0.05


@dataclass
class _Outcome:
    """What a round of training did."""

    samples: int
    mse_before: float
    mse_after: float
    accepts: int


@dataclass
class _Samples:
    """Recorded (input, target) pairs, each (seq * d_model); the oldest fall out."""

    width: int
    pairs: deque[tuple[Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=BUFFER_SIZE))

    def record(self, x: Tensor, target: Tensor) -> None:
        for name, given in (("input", x), ("target", target)):
            if given.shape != (self.width,):
                raise ShapeError(
                    f"{name} has shape {tuple(given.shape)}; it must be ({self.width},), "
                    "that is seq_len * d_model values"
                )
        self.pairs.append((x.detach().clone(), target.detach().clone()))

    def train(
        self,
        attention: FlatAttention,
        parameters: list[Tensor],
        config: EndToEndTrainConfig,
        rounds: int,
        rng: Rng,
        batch: int | None,
    ) -> _Outcome | None:
        """Run one round of trials on a strided subset; None with fewer than 4 samples."""
        pairs = list(self.pairs)[: config.max_samples]
        if len(pairs) < MIN_SAMPLES:
            return None
        stride = max(len(pairs) // min(config.eval_subset, len(pairs)), 1)
        subset = pairs[::stride][: config.eval_subset]
        inputs, targets = (
            torch.stack(each).to(parameters[0]) for each in zip(*subset, strict=True)
        )
        sequence = draw_trials(config, rounds, sum(len(p) for p in parameters), rng)
        if attention.softmax is None and batch is None:
            walk = Walk(attention, parameters, inputs, targets)
            before = walk.loss()
            return _Outcome(len(pairs), before, *walk.run(*sequence))
        kind = IncrementalTrials if attention.softmax is None else PlainTrials
        trials = kind(attention, parameters, inputs, targets)
        before = trials.loss()
        return _Outcome(len(pairs), before, *descend(trials, *sequence, batch=batch))


def _check_limits(d_model: int, d_k: int, seq_len: int) -> None:
    limits = {
        "seq_len": (seq_len, MAX_SEQ_LEN),
        "d_model": (d_model, MAX_D_MODEL),
        "d_k": (d_k, d_model),
    }
    for name, (value, most) in limits.items():
        if not 1 <= value <= most:
            bound = "d_model" if name == "d_k" else most
            raise SpecError(f"{name} is {value}; it must be in 1..={bound} at toy scale")


@torch.no_grad()
def _initialise(trees: list[SafeTree], lcg: Lcg) -> None:
    for tree in trees:
        values = [lcg.signed() * _INIT_SCALE for _ in range(tree.param_count)]
        tree.params.copy_(torch.tensor(values, dtype=torch.float64))


def _check_input(x: Tensor, width: int) -> None:
    if x.ndim not in (1, 2) or x.shape[-1] != width:
        raise ShapeError(
            f"input has shape {tuple(x.shape)}; it must be ({width},) or (batch, {width}), "
            "that is seq_len * d_model values"
        )


class ToyEmlAttention(nn.Module):
    """eml-core's single-head attention of five SafeTrees over a flattened, fixed-length sequence.

        q, k, v = trees(x);  C = softmax(q k^T / sqrt(d_k)) v;  y = out_model(C)

    Float64 by default. Parameters start in (-0.05, 0.05), from a generator seeded by d_model.

    Args:
        name: for events and JSON.
        d_model: 1 to 32.
        d_k: 1 to d_model.
        seq_len: 1 to 8.
        depth: of the trees, 3 to 5 (the softmax tree has at most 4).
        rng: "fixed", or "seed" for eml-core's faulty half-range generator in initialisation and
            training, and its switch to the untrained softmax tree once `trained`.

    Raises:
        SpecError: a size outside its limits.

    Source: the Rust crate eml-core, ToyEmlAttention.
    Differs: under "fixed" the numerical softmax, the one in use during training, stays in use
        afterwards, so the reported error is the deployed model's.
    """

    MODELS = ("q_model", "k_model", "v_model", "softmax_model", "out_model")

    def __init__(
        self, name: str, d_model: int, d_k: int, seq_len: int, depth: int, rng: Rng = "fixed"
    ) -> None:
        super().__init__()
        if not 3 <= depth <= 5:
            raise SpecError(f"depth is {depth}; it must be in 3..=5")
        _check_limits(d_model, d_k, seq_len)
        self.name = name
        self.rng: Rng = rng
        self.d_model, self.d_k, self.seq_len = d_model, d_k, seq_len
        n_in, n_out = seq_len * d_model, seq_len * d_k
        self.q_model, self.k_model, self.v_model = (SafeTree(depth, n_in, n_out) for _ in range(3))
        self.softmax_model = SafeTree(min(depth, 4), seq_len, seq_len)
        self.out_model = SafeTree(depth, n_out, n_in)
        _initialise(self.trees(), Lcg(_EML_SEED ^ d_model, rng))
        self.trained, self.tree_softmax = False, False
        self.training_rounds, self.last_accepts = 0, 0
        self.samples = _Samples(n_in)
        self.events: list[Event] = []

    def trees(self) -> list[SafeTree]:
        """Return the trees in the order of their parameters."""
        return [getattr(self, name) for name in self.MODELS]

    def _attention(self) -> FlatAttention:
        q, k, v, softmax, out = self.trees()
        return FlatAttention(q, k, v, out, self.seq_len, softmax if self.tree_softmax else None)

    @property
    def param_count(self) -> int:
        return sum(tree.param_count for tree in self.trees())

    def forward(self, x: Tensor) -> Tensor:
        """Map (seq * d_model) or (batch, seq * d_model) to the same shape.

        Raises:
            ShapeError: another shape.
        """
        _check_input(x, self.samples.width)
        return self._attention()(x)

    def record(self, x: Tensor, target: Tensor) -> None:
        """Keep one sample for training, (seq * d_model) each; at most 256 are kept.

        Raises:
            ShapeError: another shape.
        """
        self.samples.record(x, target)

    def train_end_to_end(
        self, config: EndToEndTrainConfig | None = None, batch: int | None = None
    ) -> float:
        """Run one round of coordinate descent over all trees; return the final training error.

        With fewer than 4 samples nothing is tried and the error is inf. Below
        `config.convergence_mse` the model becomes `trained` and a `Trained` event is logged.

        Args:
            config: None for the defaults.
            batch: how many to try on the guess that all fail; None for `Walk`. Same result.
        """
        config = config or EndToEndTrainConfig()
        self.training_rounds += 1
        parameters: list[Tensor] = [tree.params for tree in self.trees()]
        outcome = self.samples.train(
            self._attention(), parameters, config, self.training_rounds, self.rng, batch
        )
        if outcome is None:
            return float("inf")
        self.last_accepts = outcome.accepts
        if outcome.mse_after < config.convergence_mse:
            self.trained, self.tree_softmax = True, self.rng == "seed"
            before, after = outcome.mse_before, outcome.mse_after
            count = self.param_count
            self.events.append(Trained(self.name, outcome.samples, before, after, True, count))
        return outcome.mse_after

    def drain_events(self) -> list[Event]:
        """Return the events so far and forget them."""
        drained, self.events = self.events, []
        return drained

    def to_json(self) -> str:
        """Return eml-core's JSON, without samples and events.

        One more key, tree_softmax, is written where eml-core's rule (the softmax tree is used
        once trained) does not hold; eml-core ignores it.
        """
        sizes = {key: getattr(self, key) for key in ("name", "d_model", "d_k", "seq_len")}
        models = {name: tree_to_dict(getattr(self, name)) for name in self.MODELS}
        tail = {"scale": self.d_k**-0.5, "trained": self.trained}
        tail |= {"training_rounds": self.training_rounds}
        if self.tree_softmax != self.trained:
            tail["tree_softmax"] = self.tree_softmax
        return json.dumps(sizes | models | tail, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, rng: Rng = "fixed") -> "ToyEmlAttention":
        """Rebuild a model from eml-core's JSON or from `to_json`; `rng` rules later training.

        Raises:
            CheckpointError: damaged, or sizes that contradict each other.
        """
        fields = parse_json(text)
        required = {"name", "d_model", "d_k", "seq_len", *cls.MODELS}
        required |= {"scale", "trained", "training_rounds"}
        if set(fields) - {"tree_softmax"} != required:
            raise CheckpointError(f"keys are {sorted(fields)}; they must be {sorted(required)}")
        sizes = (fields["d_model"], fields["d_k"], fields["seq_len"])
        model = cls(fields["name"], *sizes, fields["q_model"]["depth"], rng)
        trees = {name: tree_from_dict(fields[name]) for name in cls.MODELS}
        model._adopt(trees)
        model.trained, model.training_rounds = fields["trained"], fields["training_rounds"]
        model.tree_softmax = fields.get("tree_softmax", model.trained)
        return model

    def _adopt(self, trees: dict[str, SafeTree]) -> None:
        for name, tree in trees.items():
            expected = getattr(self, name)
            if tree.extra_repr() != expected.extra_repr():
                raise CheckpointError(f"{name} is {tree!r}; the sizes call for {expected!r}")
            setattr(self, name, tree)

    @classmethod
    def from_browser_bundle(
        cls, name: str, bundle: dict[str, str], seq_len: int, rng: Rng = "fixed"
    ) -> "ToyEmlAttention":
        """Build a model from the browser demo's four exported files.

        The bundle has no softmax model, so the numerical softmax is used.

        Args:
            name: of the new model.
            bundle: the files' texts under the keys "q", "k", "v" and "out".
            seq_len: positions, which the files do not say.
            rng: rules later training.

        Raises:
            CheckpointError: a file is missing or damaged, or the sizes do not fit.
        """
        if set(bundle) != {"q", "k", "v", "out"}:
            raise CheckpointError(f"bundle has {sorted(bundle)}; it must have k, out, q, v")
        trees = {f"{key}_model": _tree_from_browser(text) for key, text in bundle.items()}
        q = trees["q_model"]
        if q.inputs % seq_len or q.heads % seq_len:
            raise CheckpointError(
                f"q maps {q.inputs} to {q.heads} values; neither splits into seq_len {seq_len}"
            )
        model = cls(name, q.inputs // seq_len, q.heads // seq_len, seq_len, q.depth, rng)
        model._adopt(trees)
        model.trained = all(parse_json(text).get("trained", False) for text in bundle.values())
        return model


def _tree_from_browser(text: str) -> SafeTree:
    """Convert level0_weight, level0_bias and tree_params to the flat layout."""
    fields = parse_json(text)
    keys = ("depth", "inputs", "heads", "level0_weight", "level0_bias", "tree_params")
    missing = [key for key in keys if key not in fields]
    if missing:
        raise CheckpointError(f"the browser file lacks {missing}")
    weight, chain = fields["level0_weight"], fields["tree_params"]
    flat = [v for row in weight for v in row] + fields["level0_bias"]
    flat += [v for row in chain for v in row]
    return tree_from_dict({key: fields[key] for key in keys[:3]} | {"params": flat})


class BaselineAttention(nn.Module):
    """`ToyEmlAttention` with plain affine maps in place of EML trees: what the trees must beat.

    Args:
        name, d_model, d_k, seq_len, rng: as for `ToyEmlAttention`.

    Raises:
        SpecError: a size outside its limits.

    Source: the Rust crate eml-core, BaselineAttention.
    """

    LAYERS = ("q", "k", "v", "out")

    def __init__(self, name: str, d_model: int, d_k: int, seq_len: int, rng: Rng = "fixed") -> None:
        super().__init__()
        _check_limits(d_model, d_k, seq_len)
        self.name = name
        self.rng: Rng = rng
        self.d_model, self.d_k, self.seq_len = d_model, d_k, seq_len
        n_in, n_out = seq_len * d_model, seq_len * d_k
        self.q, self.k, self.v = (SafeTree(0, n_in, n_out) for _ in range(3))
        self.out = SafeTree(0, n_out, n_in)
        _initialise(self.trees(), Lcg(_AFFINE_SEED ^ d_model, rng))
        self.trained = False
        self.training_rounds, self.last_accepts = 0, 0
        self.samples = _Samples(n_in)

    def trees(self) -> list[SafeTree]:
        """Return the trees in the order of their parameters."""
        return [self.q, self.k, self.v, self.out]

    def _attention(self) -> FlatAttention:
        return FlatAttention(self.q, self.k, self.v, self.out, self.seq_len)

    @property
    def param_count(self) -> int:
        return sum(tree.param_count for tree in self.trees())

    def forward(self, x: Tensor) -> Tensor:
        """Map (seq * d_model) or (batch, seq * d_model) to the same shape."""
        _check_input(x, self.samples.width)
        return self._attention()(x)

    def record(self, x: Tensor, target: Tensor) -> None:
        """Keep one sample for training; see `ToyEmlAttention.record`."""
        self.samples.record(x, target)

    def train_end_to_end(
        self, config: EndToEndTrainConfig | None = None, batch: int | None = None
    ) -> float:
        """Run one round of coordinate descent; see `ToyEmlAttention.train_end_to_end`."""
        config = config or EndToEndTrainConfig()
        self.training_rounds += 1
        parameters: list[Tensor] = [tree.params for tree in self.trees()]
        outcome = self.samples.train(
            self._attention(), parameters, config, self.training_rounds, self.rng, batch
        )
        if outcome is None:
            return float("inf")
        self.last_accepts = outcome.accepts
        self.trained |= outcome.mse_after < config.convergence_mse
        return outcome.mse_after

    def to_json(self) -> str:
        """Return eml-core's JSON, without samples."""
        sizes = {key: getattr(self, key) for key in ("name", "d_model", "d_k", "seq_len")}
        layers = {n: tree_to_dict(getattr(self, n), ("inputs", "heads")) for n in self.LAYERS}
        tail = {"scale": self.d_k**-0.5, "trained": self.trained}
        tail |= {"training_rounds": self.training_rounds}
        return json.dumps(sizes | layers | tail, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, rng: Rng = "fixed") -> "BaselineAttention":
        """Rebuild a model from `to_json` or from eml-core's JSON.

        Raises:
            CheckpointError: damaged, or sizes that contradict each other.
        """
        fields = parse_json(text)
        required = {"name", "d_model", "d_k", "seq_len", *cls.LAYERS}
        required |= {"scale", "trained", "training_rounds"}
        if set(fields) != required:
            raise CheckpointError(f"keys are {sorted(fields)}; they must be {sorted(required)}")
        d_model, d_k, seq_len = (fields[key] for key in ("d_model", "d_k", "seq_len"))
        model = cls(fields["name"], d_model, d_k, seq_len, rng)
        for name in cls.LAYERS:
            tree, expected = tree_from_dict(fields[name], depth=0), getattr(model, name)
            if tree.extra_repr() != expected.extra_repr():
                raise CheckpointError(f"{name} is {tree!r}; the sizes call for {expected!r}")
            setattr(model, name, tree)
        model.trained, model.training_rounds = fields["trained"], fields["training_rounds"]
        return model
