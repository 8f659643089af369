"""eml-core's toy attention and its affine twin: same interface, limits, JSON and training."""

from __future__ import annotations

from typing import ClassVar

from kizzasi.eml.core.fields import Fields, write
from kizzasi.eml.core.flat import FlatAttention
from kizzasi.eml.core.rng import Rng
from kizzasi.eml.core.tree import TREE_KEYS, SafeTree, build_tree, read_tree, tree_to_dict
from kizzasi.errors import CheckpointError, SpecError

MAX_TOY_SEQ_LEN = 8
MAX_TOY_D_MODEL = 32
_EML_SEED, _AFFINE_SEED = 0x6D6174746861777F, 0x426C696E65537465
_SIZES = ("name", "d_model", "d_k", "seq_len")
_TAIL = ("scale", "trained", "training_rounds")


def _check_limits(d_model: int, d_k: int, seq_len: int) -> None:
    limits = {
        "seq_len": (seq_len, MAX_TOY_SEQ_LEN),
        "d_model": (d_model, MAX_TOY_D_MODEL),
        "d_k": (d_k, d_model),
    }
    for name, (value, most) in limits.items():
        if not 1 <= value <= most:
            bound = "d_model" if name == "d_k" else most
            raise SpecError(f"{name} is {value}; it must be in 1..={bound} at toy scale")


class ToyEmlAttention(FlatAttention):
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

    MODELS: ClassVar[tuple[str, ...]] = (
        "q_model",
        "k_model",
        "v_model",
        "softmax_model",
        "out_model",
    )

    def __init__(
        self, name: str, d_model: int, d_k: int, seq_len: int, depth: int, rng: Rng = "fixed"
    ) -> None:
        if not 3 <= depth <= 5:
            raise SpecError(f"depth is {depth}; it must be in 3..=5")
        _check_limits(d_model, d_k, seq_len)
        n_in, n_out = seq_len * d_model, seq_len * d_k
        trees = [SafeTree(depth, n_in, n_out) for _ in range(3)]
        trees += [SafeTree(min(depth, 4), seq_len, seq_len), SafeTree(depth, n_out, n_in)]
        named = dict(zip(self.MODELS, trees, strict=True))
        super().__init__(name, (d_model, d_k, seq_len), named, _EML_SEED, rng)

    def to_json(self) -> str:
        """Return eml-core's JSON, without samples and events.

        One more key, tree_softmax, is written where eml-core's rule (the softmax tree is used
        once trained) does not hold; eml-core ignores it.
        """
        fields = {key: getattr(self, key) for key in _SIZES}
        fields |= {name: tree_to_dict(getattr(self, name)) for name in self.MODELS}
        fields |= {key: getattr(self, key) for key in _TAIL}
        if self.tree_softmax != self.trained:
            fields["tree_softmax"] = self.tree_softmax
        return write(fields)

    @classmethod
    def from_json(cls, text: str, rng: Rng = "fixed") -> ToyEmlAttention:
        """Rebuild a model from eml-core's JSON or from `to_json`; `rng` rules later training.

        Raises:
            CheckpointError: damaged, or sizes that contradict each other.
        """
        fields = Fields.parse(text, (*_SIZES, *cls.MODELS, *_TAIL), ("tree_softmax",))
        trees = {name: read_tree(fields.inner(name, TREE_KEYS)) for name in cls.MODELS}
        sizes = (fields.whole("d_model"), fields.whole("d_k"), fields.whole("seq_len"))
        try:
            model = cls(fields.text("name"), *sizes, trees["q_model"].depth, rng)
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        model.adopt(trees)
        model.adopt_tail(fields)
        model.tree_softmax = model.trained
        if "tree_softmax" in fields.data:
            model.tree_softmax = fields.flag("tree_softmax")
        return model

    @classmethod
    def from_browser_bundle(
        cls, name: str, bundle: dict[str, str], seq_len: int, rng: Rng = "fixed"
    ) -> ToyEmlAttention:
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
        read = {f"{key}_model": _tree_from_browser(text) for key, text in bundle.items()}
        trees = {key: tree for key, (tree, _) in read.items()}
        q = trees["q_model"]
        if seq_len < 1 or q.inputs % seq_len or q.heads % seq_len:
            raise CheckpointError(
                f"q maps {q.inputs} to {q.heads} values; neither splits into seq_len {seq_len}"
            )
        try:
            model = cls(name, q.inputs // seq_len, q.heads // seq_len, seq_len, q.depth, rng)
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        model.adopt(trees)
        model.trained = all(trained for _, trained in read.values())
        return model


def _tree_from_browser(text: str) -> tuple[SafeTree, bool]:
    """Convert level0_weight, level0_bias and tree_params to the flat layout; say if trained."""
    keys = ("depth", "inputs", "heads", "level0_weight", "level0_bias", "tree_params")
    fields = Fields.parse(text, keys, None)
    depth, inputs, heads = (
        fields.whole("depth"),
        fields.whole("inputs", 1),
        fields.whole("heads", 1),
    )
    flat = fields.table("level0_weight", heads, inputs) + fields.numbers("level0_bias", heads)
    flat += fields.table("tree_params", heads, 3 * depth)
    trained = "trained" in fields.data and fields.flag("trained")
    return build_tree(depth, inputs, heads, flat), trained


class BaselineAttention(FlatAttention):
    """`ToyEmlAttention` with plain affine maps in place of EML trees: what the trees must beat.

    Args:
        name, d_model, d_k, seq_len, rng: as for `ToyEmlAttention`.

    Raises:
        SpecError: a size outside its limits.

    Source: the Rust crate eml-core, BaselineAttention.
    """

    LAYERS: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out")

    def __init__(self, name: str, d_model: int, d_k: int, seq_len: int, rng: Rng = "fixed") -> None:
        _check_limits(d_model, d_k, seq_len)
        n_in, n_out = seq_len * d_model, seq_len * d_k
        maps = [SafeTree(0, n_in, n_out) for _ in range(3)] + [SafeTree(0, n_out, n_in)]
        named = dict(zip(self.LAYERS, maps, strict=True))
        super().__init__(name, (d_model, d_k, seq_len), named, _AFFINE_SEED, rng)

    def to_json(self) -> str:
        """Return eml-core's JSON, without samples."""
        fields = {key: getattr(self, key) for key in _SIZES}
        for name in self.LAYERS:
            layer = tree_to_dict(getattr(self, name))
            fields[name] = {key: layer[key] for key in TREE_KEYS[1:]}
        return write(fields | {key: getattr(self, key) for key in _TAIL})

    @classmethod
    def from_json(cls, text: str, rng: Rng = "fixed") -> BaselineAttention:
        """Rebuild a model from `to_json` or from eml-core's JSON.

        Raises:
            CheckpointError: damaged, or sizes that contradict each other.
        """
        fields = Fields.parse(text, (*_SIZES, *cls.LAYERS, *_TAIL))
        trees = {name: read_tree(fields.inner(name, TREE_KEYS[1:]), 0) for name in cls.LAYERS}
        sizes = (fields.whole("d_model"), fields.whole("d_k"), fields.whole("seq_len"))
        try:
            model = cls(fields.text("name"), *sizes, rng)
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        model.adopt(trees)
        model.adopt_tail(fields)
        return model
