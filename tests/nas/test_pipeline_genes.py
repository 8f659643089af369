"""No dead gene: whatever field of the language is changed, the model, its cost or its training is
another one, or the change is refused. The schema itself is enumerated."""

import dataclasses
import functools
import json
import typing
from types import SimpleNamespace

import pytest
import torch

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixers import RetentionSpec
from kizzasi.nas.pipelines import document, examined, parts
from kizzasi.nas.pipelines.misfits import changed, found_at
from kizzasi.nas.pipelines.space import topologies
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.strict import field_types

ATTENTION = {"kind": "Attention", "heads": 4}
STACK = {
    "n_layers": 1,
    "mix_unit": {"kind": "single", "mixer": ATTENTION},
    "pos": {"kind": "rope"},
    "ffn": {"kind": "dense", "mult": 2.0, "act": "gelu"},
}
PLAIN = {
    "arch": {"d_model": 16, "norm": "RMSNorm", **STACK, "n_layers": 3},
    "train": {"ctx_len": 32, "vocab_size": 23},
}
STAGED = {
    "arch": {
        "d_model": 16,
        "norm": "RMSNorm",
        "modules": {
            "low": {"kind": "transformer", **STACK, "budget": {"flops_per_token": 1e6}},
            "high": {"kind": "transformer", **STACK},
            "in": {"kind": "embedding", "params": {"vocab_size": 23}},
            "out": {"kind": "readout", "output_dim": 23},
        },
        "pipeline": [
            {"name": "in"},
            {"name": "low"},
            {"name": "high"},
            {"name": "again", "module": "low"},
            {"name": "out"},
        ],
    },
    "train": {"ctx_len": 32, "vocab_size": 23},
}
words = SimpleNamespace(
    **vars(parts), **{k: v for k, v in vars(document).items() if k not in vars(parts)}
)
UNIT, MIXER = "arch.mix_unit", "arch.mix_unit.mixer"
ROUTE = {
    "kind": "route",
    "choices": [ATTENTION, {"kind": "SSM", "d_state": 4}],
    "router": {"topk": 1},
}
LOOP = {"prelude": 1, "body": 1, "coda": 1, "adapter": "residual", "loops": {"eval": 2}}
DRAWN = {**LOOP, "loops": {"eval": 2, "schedule": {"kind": "poisson_lognormal"}}}


def with_(path, value, base=PLAIN):
    return changed(base, path, value)


LATENT = with_(
    "arch.cond",
    {
        "source": {"kind": "pool-mlp", "H": 4},
        "reg": {"kind": "freebits", "kappa": 0.1},
        "ops": [{"where": "pre_mixer", "op": "add"}],
    },
)


# class -> a document that holds one, and where. Every class of the language stands here.
HOLDERS = {
    words.Document: (PLAIN, ""),
    words.Arch: (PLAIN, "arch"),
    words.Train: (PLAIN, "train"),
    words.TrainBudget: (with_("train.budget", {"tokens_per_step": 64}), "train.budget"),
    words.Budget: (with_("budget", {"flops_target": 1e7}), "budget"),
    words.MixUnit: (PLAIN, UNIT),
    words.Router: (with_(UNIT, ROUTE), f"{UNIT}.router"),
    words.Mixer: (PLAIN, MIXER),
    words.Stencil: (with_(f"{MIXER}.stencil", {"kind": "local", "window": 8}), f"{MIXER}.stencil"),
    words.Softmax: (with_(f"{MIXER}.softmax", {"softcap": 5.0}), f"{MIXER}.softmax"),
    words.Kernel: (
        with_(
            f"{MIXER}.softmax",
            {"type": "kernel", "kernel": {"features": 8, "name": "favor"}},
            {**PLAIN, "arch": {k: v for k, v in PLAIN["arch"].items() if k != "pos"}},
        ),
        f"{MIXER}.softmax.kernel",
    ),
    words.Projection: (
        with_(f"{MIXER}.projection", {"type": "low_rank", "rank": 4}),
        f"{MIXER}.projection",
    ),
    words.FFN: (PLAIN, "arch.ffn"),
    words.Pos: (PLAIN, "arch.pos"),
    words.Rope: (with_("arch.pos.rope", {"theta": 100.0}), "arch.pos.rope"),
    words.Scaling: (
        with_(
            "arch.pos.rope",
            {"scaling": {"type": "yarn", "factor": 2.0}},
            with_(f"{MIXER}.heads", 1),
        ),
        "arch.pos.rope.scaling",
    ),
    words.LongRope: (
        with_(
            "arch.pos.rope",
            {"scaling": {"type": "longrope", "factor": 2.0, "longrope": {"divisors": [1.0, 2.0]}}},
        ),
        "arch.pos.rope.scaling.longrope",
    ),
    words.Cond: (
        with_("arch.cond", {"ops": [{"where": "pre_mixer", "op": "film"}]}),
        "arch.cond",
    ),
    words.Source: (
        with_(
            "arch.cond",
            {"source": {"kind": "pool-mlp"}, "ops": [{"where": "pre_mixer", "op": "film"}]},
        ),
        "arch.cond.source",
    ),
    words.Reg: (LATENT, "arch.cond.reg"),
    words.Op: (
        with_("arch.cond", {"ops": [{"where": "pre_mixer", "op": "film"}]}),
        "arch.cond.ops[0]",
    ),
    words.KVPolicy: (with_("arch.kv_policy", {"cache": "full"}), "arch.kv_policy"),
    words.LatentCache: (
        with_("arch.kv_policy", {"cache": "latent", "latent": {"dim": 4}}),
        "arch.kv_policy.latent",
    ),
    words.Update: (
        with_(
            "arch.kv_policy",
            {"cache": "latent", "latent": {"dim": 4, "update": {"kind": "ema", "tau": 0.5}}},
        ),
        "arch.kv_policy.latent.update",
    ),
    words.Residual: (
        with_("arch.residual", {"kind": "dual", "pre_ln": True, "post_ln": True}),
        "arch.residual",
    ),
    words.Hierarchy: (
        with_("arch.hierarchy", {"levels": [{"every": 1, "downsample": 0.5}]}),
        "arch.hierarchy",
    ),
    words.Level: (
        with_("arch.hierarchy", {"levels": [{"every": 1, "downsample": 0.5}]}),
        "arch.hierarchy.levels[0]",
    ),
    words.DepthRouter: (
        with_("arch.depth_router", {"kind": "token", "budget": 0.5}),
        "arch.depth_router",
    ),
    words.Recurrence: (with_("arch.recurrence", LOOP), "arch.recurrence"),
    words.Loops: (with_("arch.recurrence", LOOP), "arch.recurrence.loops"),
    words.LoopSchedule: (with_("arch.recurrence", DRAWN), "arch.recurrence.loops.schedule"),
    words.Module: (STAGED, "arch.modules.low"),
    words.ModuleBudget: (STAGED, "arch.modules.low.budget"),
    words.Params: (STAGED, "arch.modules.in.params"),
    words.Stage: (STAGED, "arch.pipeline[2]"),
    words.StageBudget: (
        with_("arch.pipeline[1].budget", {"compute_multiplier": 1.0}, STAGED),
        "arch.pipeline[1].budget",
    ),
}
CODED = with_("arch.kv_policy", {"cache": "full", "quant": "nf4"})
CHUNKED = with_("arch.hierarchy", {"levels": [{"every": 1, "chunk": 2.0}]})
FILM = [{"where": "pre_mixer", "op": "film"}]
SEGMENTS = with_("arch.cond", {"source": {"kind": "segment", "segment": 4}, "ops": FILM})
GROWS = {**LOOP, "loops": {"eval": 4, "schedule": {"kind": "fixed", "curriculum": "linear"}}}
GROWS = with_("arch.recurrence", changed(GROWS, "loops.schedule.warmup_steps", 8))
FIRST = {**LOOP, "noise_std": 0.1, "loops": {"eval": 2, "keys": "first"}}
# Fields that another document brings to life: (class, field) -> it, and where.
ELSEWHERE = {
    **{(words.Source, name): (LATENT, "arch.cond.source") for name in ("query", "form", "seed")},
    (words.Source, "segment"): (SEGMENTS, "arch.cond.source"),
    (words.Op, "where"): (LATENT, "arch.cond.ops[0]"),
    (words.KVPolicy, "group"): (CODED, "arch.kv_policy"),
    (words.Level, "chunk"): (CHUNKED, "arch.hierarchy.levels[0]"),
    (words.Level, "balance"): (CHUNKED, "arch.hierarchy.levels[0]"),
    (words.LoopSchedule, "curriculum"): (GROWS, "arch.recurrence.loops.schedule"),
    (words.LoopSchedule, "warmup_steps"): (GROWS, "arch.recurrence.loops.schedule"),
    (words.Recurrence, "seed"): (with_("arch.recurrence", FIRST), "arch.recurrence"),
    (words.Loops, "tolerance"): (with_("arch.recurrence", FIRST), "arch.recurrence.loops"),
}
# Two words for one thing: a sliding window is local, and a ring is how a window is kept.
SAME = {("Stencil", "kind", "sliding"), ("KVPolicy", "cache", "ring")}
# What turns the projection turns what it gives.
SAME |= {("Op", "where", "q"), ("Op", "where", "v")}
# A norm that stores its gain less one differs in what weight decay pulls it to.
SAME |= {(cls, "norm", "rms_plus_one") for cls in ("Arch", "Module", "Recurrence")}
WHOLE = {  # what a part may be, where its type is another class
    words.MixUnit: ROUTE,
    words.FFN: {"kind": "moe", "experts": 2, "topk": 1, "act": "swiglu", "mult": 1.0},
    words.Mixer: {"kind": "SSM", "d_state": 4},
    words.Pos: {"kind": "alibi"},
    words.Source: {"kind": "segment"},
    words.Reg: {"kind": "freebits", "kappa": 0.5},
    words.KVPolicy: {"cache": "window", "window": 4},
    words.Loops: {"eval": 3},
    words.ModuleBudget: {"flops_per_token": 1.0},
    words.StageBudget: {"compute_multiplier": 1e-6},
    words.Budget: {"flops_target": 1.0},
    words.TrainBudget: {"tokens_per_step": 96},
    words.Params: {"vocab_size": 9},
}
LISTS = {  # of these fields
    "inputs": [["low"], ["in"]],
    "kv_from": [["low"]],
    "mem_from": [["low"]],
    "betas": [[0.9, 0.999]],
    "choices": [[ATTENTION]],
    "ops": [[{"where": "post_mixer", "op": "film"}]],
    "levels": [[{"every": 1, "downsample": 0.25}]],
    "pipeline": [[{"name": "in"}, {"name": "high"}, {"name": "low"}, {"name": "out"}]],
    "modules": [{"more": {"kind": "transformer", **STACK}}],
    "model": [{"tie_head": True}],
    "divisors": [[1.0, 3.0]],
    "layers": [[{"mixer": {"kind": "mamba"}}]],
}


def classes():
    return [c for c in vars(words).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


def test_every_class_of_the_language_is_held():
    assert {*HOLDERS, words.Own, words.Stack} == set(classes())


@pytest.mark.parametrize("cls", HOLDERS, ids=lambda cls: cls.__name__)
def test_what_holds_a_class_fits(cls):
    """Where it is refused, every change of it is, and the tests below say nothing."""
    base, path = HOLDERS[cls]
    assert outcome(json.dumps(base)) is not None, examined(base)[1]
    assert found_at(base, path) is not None or not path


def options(hint, value, name):
    """Other values of a field, by its type."""
    if name in LISTS:
        return LISTS[name]
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if type(None) in typing.get_args(hint):
        return options(args[0], value, name)
    if typing.get_origin(hint) is typing.Literal:
        found = list(args)
    elif hint is bool:
        found = [True, False]
    elif hint in (int, float):
        usual = 4 if value is None else value
        low = [1] if hint is int else [1.0, 1e-3]
        found = [hint(2 * usual), hint(max(1, usual // 2) if hint is int else usual / 2), *low]
    elif hint is str:
        found = ["low", "in"]
    else:
        found = [WHOLE.get(hint) or found_at(*HOLDERS[hint])]
    return [one for one in found if one != value]


@functools.cache
def outcome(text):
    """None if refused; else all that a document decides: spec, recipe, and what the model does."""
    pipeline, found = examined(json.loads(text))
    if found or pipeline is None:
        return None
    cost = pipeline.spec.cost(32)
    return (str(sorted(pipeline.recipe.items())), cost, does(pipeline.spec))


@functools.cache
def does(spec):
    """Outputs in evaluation; of a training step the loss and its slopes; what steps change."""
    model = build_model(spec, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.dtype))
        tokens = torch.arange(24)[None] * 7 % spec.stem.vocab_size
        out = model.eval()(tokens).logits.double().sum().item()
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        trained = model.train()(tokens)
    loss = trained.logits.double().square().sum() + sum(trained.aux.values())
    loss.backward()
    zero = torch.zeros((), dtype=torch.float64)
    slopes = sum(
        (p.grad.double().abs().sum() for p in model.parameters() if p.grad is not None), zero
    )
    for _ in range(4):
        model.after_step()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        trained = model.train()(tokens).logits.double().sum()
        later = model.eval()(tokens).logits.double().sum()
    results = torch.tensor(out), loss, slopes, trained, later
    return tuple(round(float(x.detach()), 9) for x in results)


FIELDS = [
    pytest.param(cls, name, HOLDERS[cls], id=f"{cls.__name__}.{name}")
    for cls in HOLDERS
    for name in field_types(cls)
]
FIELDS += [
    pytest.param(cls, name, holder, id=f"{cls.__name__}.{name} elsewhere")
    for (cls, name), holder in ELSEWHERE.items()
]


@pytest.mark.parametrize(("cls", "name"), [param.values[:2] for param in FIELDS[-len(ELSEWHERE) :]])
def test_a_field_lives_elsewhere(cls, name):
    """Some value of it makes another model, and is not refused."""
    base, path = ELSEWHERE[cls, name]
    value = found_at(base, f"{path}.{name}")
    tried = options(field_types(cls)[name], value, name)
    after = [outcome(json.dumps(changed(base, f"{path}.{name}", one))) for one in tried]
    before = outcome(json.dumps(base))
    assert before is not None
    assert any(one is not None and one != before for one in after), f"{path}.{name}: {tried}"


@pytest.mark.parametrize(("cls", "name", "holder"), FIELDS)
def test_no_field_is_dead(cls, name, holder):
    base, path = holder
    where = f"{path}.{name}" if path else name
    value = found_at(base, where)
    if cls is words.Document and name in ("arch", "train"):
        return  # their own fields are asked one by one
    tried = options(field_types(cls)[name], value, name)
    before = outcome(json.dumps(base))
    after = [outcome(json.dumps(changed(base, where, one))) for one in tried]
    words_of_it = [one for one in tried if isinstance(one, str)]
    if len(words_of_it) < len(tried):  # of numbers and parts some may be no bound, or what was
        assert any(one is None or one != before for one in after), f"{where}: {tried} are dead"
        return
    known = [] if value is None else [before]  # one word may say what is so without it
    for word, one in zip(tried, after, strict=True):
        assert one is None or one not in known or (cls.__name__, name, word) in SAME, (
            f"{where}: {word!r} is another word for nothing new"
        )
        known.append(one)


@pytest.mark.parametrize(
    ("move", "field", "values"),
    [
        (topologies.hierarchy, "factor", {2, 4}),
        (topologies.hierarchy, "upsampling", {"repeat", "linear"}),
        (topologies.chunking, "rate", {2.0, 4.0, 6.0}),
        (topologies.depth_router, "capacity", {0.25, 0.5, 0.75}),
        (topologies.recurrence, "n_loops", {2, 3}),
        (topologies.recurrence, "adapter", {"identity", "residual", "concat_linear"}),
        (topologies.condition, "op", {"film", "add", "scale", "lora"}),
    ],
)
def test_a_move_draws_every_value_and_no_other(move, field, values):
    spec = ModelSpec(16, (BlockSpec(RetentionSpec(n_heads=2)),), Tokens(9))
    made = [move(spec, Xorshift64(seed)).blocks[0] for seed in range(1, 60)]
    assert {getattr(layer, field) for layer in made} == values
