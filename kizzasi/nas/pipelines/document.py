"""A pipeline as it is written: EvoForge's names, field by field, and no others.

These classes, with those of `parts`, are the one source: what is read, printed, checked against
bounds, and told to editors as JSON Schema. A field that is None was not written. What a field means
is in `compiling`.

Source: EvoForge (transformer-evolution), whose files are read as they are.
Differs: an unknown key is an error. A mixer or feed-forward part may also be one of the house's own
    kinds with its own fields, so that every `ModelSpec` has a spelling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kizzasi.nas.pipelines.parts import (
    FFN,
    Cond,
    KVPolicy,
    MixUnit,
    NormName,
    Pos,
    Residual,
    bounded,
)
from kizzasi.strict import Strict

Mode = Literal["all", "train", "prefill", "decode", "train_prefill", "inference"]


@dataclass(frozen=True)
class Level(Strict):
    """Layers that run at a lower rate.

    Args:
        every: from so many layers off either end inwards.
        downsample: the rate.
        pool, up_proj: whether tokens are joined by learned weights, and parted so.
        chunk: in the place of all these: tokens of a chunk on average, whose ends are learned.
        balance: weight of the loss that keeps to it.
    """

    every: int
    downsample: float | None = bounded(above=0, most=1)
    pool: Literal["mean", "linear"] | None = None
    up_proj: bool | None = None
    chunk: float | None = bounded(above=1)
    balance: float | None = bounded(above=0)


@dataclass(frozen=True)
class Hierarchy(Strict):
    """Layers at lower rates, nested."""

    levels: tuple[Level, ...]


@dataclass(frozen=True)
class DepthRouter(Strict):
    """Layers that a part of the tokens skip.

    Args:
        kind: each layer by itself ("token"), or all as one ("layer").
        budget: share of the tokens that do not.
        tau: temperature of their scores.
        min_layers: first layers that none skips.
        balance: weight of the loss that keeps to the budget.
    """

    kind: Literal["token", "layer", "none"]
    budget: float | None = bounded(above=0, most=1)
    tau: float | None = bounded(above=0)
    min_layers: int | None = bounded(0)
    balance: float | None = bounded(above=0)


@dataclass(frozen=True)
class LoopSchedule(Strict):
    """How many times a body runs in training.

    Args:
        kind: always the same number, or one drawn for every step.
        mean, sigma: of what is drawn: 1 + Poisson(u), u lognormal; the mean is that of loops.train.
        min, max: bounds of it.
        curriculum, warmup_steps: how the number grows from 1 to its mean, over how many steps.
        backprop: the last so many have gradients.
    """

    kind: Literal["fixed", "poisson_lognormal"]
    mean: float | None = bounded(above=0)
    sigma: float | None = bounded(0)
    min: int | None = bounded(1)
    max: int | None = bounded(1)
    curriculum: Literal["none", "linear", "sqrt"] | None = None
    warmup_steps: int | None = bounded(0)
    backprop: int | None = bounded(1)


@dataclass(frozen=True)
class Loops(Strict):
    """How many times a body runs.

    Args:
        train, eval: times; each is the other's where one alone is given.
        schedule: of training.
        keys: an iterate reads its own keys and values ("each"), or those of the first.
        tolerance: relative change at which a token stops, in evaluation.
    """

    train: int | None = bounded(1)
    eval: int | None = bounded(1)
    schedule: LoopSchedule | None = None
    keys: Literal["each", "first"] | None = None
    tolerance: float | None = bounded(0)


@dataclass(frozen=True)
class Recurrence(Strict):
    """Layers before, inside and after a loop; they sum to n_layers.

    Args:
        prelude, body, coda: how many.
        adapter: what an iterate reads of the one before and of the prelude.
        noise_std, seed: of what the loop starts from.
        norm: after the last iterate.
        loops: how many times.
    """

    prelude: int = field(metadata={"minimum": 0})
    body: int = field(metadata={"minimum": 1})
    coda: int = field(metadata={"minimum": 0})
    adapter: Literal["identity", "residual", "concat_linear"] | None = None
    noise_std: float | None = bounded(0)
    seed: int | None = bounded(0)
    norm: NormName | None = None
    loops: Loops | None = None


@dataclass(frozen=True)
class ModuleBudget(Strict):
    """What a module may take."""

    tokens_per_step: int | None = bounded(1)
    flops_per_token: float | None = bounded(0)
    latency_ms: float | None = bounded(0)


@dataclass(frozen=True)
class Params(Strict):
    """Further settings of a module: of an embedding, a latent sampler, a custom one (its layers, as
    a ModelSpec writes them)."""

    vocab_size: int | None = bounded(1)
    latent_dim: int | None = bounded(1)
    layers: Any = None


@dataclass(frozen=True)
class Stack(Strict):
    """What describes a stack of layers: of the whole model, or of one module."""

    d_model: int | None = bounded(1)
    n_layers: int | None = bounded(1)
    mix_unit: MixUnit | None = None
    ffn: FFN | None = None
    norm: NormName | None = None
    pos: Pos | None = None
    cond: Cond | None = None
    kv_policy: KVPolicy | None = None
    residual: Residual | None = None
    hierarchy: Hierarchy | None = None
    depth_router: DepthRouter | None = None
    recurrence: Recurrence | None = None


@dataclass(frozen=True)
class Module(Stack):
    """A named part of a pipeline. What a transformer leaves out is the model's."""

    kind: Literal["transformer", "latent_sampler", "readout", "embedding", "custom"] = field(
        default="transformer"
    )
    output_dim: int | None = bounded(1)
    params: Params | None = None
    budget: ModuleBudget | None = None


@dataclass(frozen=True)
class StageBudget(Strict):
    """Factors of the module's budget."""

    tokens_multiplier: float | None = bounded(above=0)
    compute_multiplier: float | None = bounded(above=0)


@dataclass(frozen=True)
class Stage(Strict):
    """A place in the pipeline.

    Args:
        name: unique.
        module: what stands there; the stage's own name where it is not given.
        kind: what sort of module it is.
        repeat: times that the module runs, on the same weights.
        mode: when it runs.
        train_only, prefill_only: the modes "train" and "prefill" in other words.
        inputs, kv_from, mem_from: earlier stages that it reads.
        params, budget: of this stage.
    """

    name: str
    module: str | None = None
    kind: Literal["module", "latent_sampler", "readout", "embedding", "custom"] | None = None
    repeat: int | None = bounded(1)
    mode: Mode | None = None
    train_only: bool | None = None
    prefill_only: bool | None = None
    inputs: tuple[str, ...] = ()
    kv_from: tuple[str, ...] = ()
    mem_from: tuple[str, ...] = ()
    params: Params | None = None
    budget: StageBudget | None = None


@dataclass(frozen=True)
class Arch(Stack):
    """The model. With a `pipeline` its stages are the model, and the rest their defaults.

    Args:
        modules, pipeline: see there.
        model: fields of ModelSpec that no other key says, such as tie_head.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    pipeline: tuple[Stage, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainBudget(Strict):
    """Tokens of a step, steps, and the flops that a step may take, forward and backward."""

    tokens_per_step: int | None = bounded(1)
    max_steps: int | None = bounded(1)
    flops_per_step: float | None = bounded(above=0)


@dataclass(frozen=True)
class Train(Strict):
    """How the model is trained.

    Args:
        ctx_len: window in tokens.
        lr, wd, betas, clip: of the optimiser.
        dtype: no field of the house: the device decides.
        vocab_size: ids; 256, that is bytes, where it is not given.
        budget: see there.
    """

    ctx_len: int = field(metadata={"minimum": 1})
    lr: float | None = bounded(above=0)
    wd: float | None = bounded(0)
    betas: tuple[float, ...] = ()
    clip: float | None = bounded(above=0)
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    vocab_size: int | None = bounded(1)
    budget: TrainBudget | None = None


@dataclass(frozen=True)
class Budget(Strict):
    """What the whole model has to come to: parameters within a tenth, and flops per token."""

    params_target: float | None = bounded(above=0)
    flops_target: float | str | None = None


@dataclass(frozen=True)
class Document(Strict):
    """A whole file."""

    arch: Arch
    train: Train
    budget: Budget | None = None
