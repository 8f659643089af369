"""What the latent bits of a Free Transformer carry, and what they cost.

places   the paper's synthetic test: lines that hide a place, for several free bits kappa. What the
         bits cost, what a line then takes, and how alike lines are that are drawn with equal bits.
text     bits per byte of unseen text, the latent's own bits paid for, beside a plain Transformer of
         equal parameters and tokens.

examples:
  python scripts/free_transformer.py places
  python scripts/free_transformer.py text --seeds 3

Source: Fleuret 2025, arXiv:2510.17558, sections 4.1 and 4.2.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from kizzasi.models import ModelOutput, ModelSpec, SequenceModel, build_model, presets
from kizzasi.models.layers.latent import with_latent_key
from kizzasi.train import Recipe, Training
from kizzasi.train.open import open_task
from kizzasi.train.synthetic import HiddenPlace, SyntheticTask
from kizzasi.train.trainer import to_score

N_TEXTS, N_ALIKE = 64, 8  # latents that lines are drawn with, and lines of each


def plain(d_model: int, n_layers: int, vocab_size: int, hidden: int | None = None) -> ModelSpec:
    hidden = hidden or 8 * round(d_model / 3)
    return presets.llama(d_model, n_layers, d_model // 16, d_model // 16, hidden, vocab_size)


def twin(spec: ModelSpec, n_layers: int) -> ModelSpec:
    """The plain Transformer with one layer more and as many parameters as nearly as can be."""
    assert hasattr(spec.stem, "vocab_size")
    make = partial(plain, spec.d_model, n_layers + 1, spec.stem.vocab_size)  # pyright: ignore
    wanted = spec.cost(1).params
    return min(map(make, range(1, 8 * spec.d_model)), key=lambda s: abs(s.cost(1).params - wanted))


def charges(logits: Tensor, vocab_size: int) -> Tensor:
    """(b, t) nats of the bits, of the logits of a coded score."""
    return -logits[..., :vocab_size].logsumexp(-1)


# --------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Carried:
    """What was found: kl and ce in bits a token; line: all bits of a line; sound: the share of
    drawn lines that could be. Of two lines drawn with equal bits, and of two drawn with others:
    place, how often it is equal; apart, characters between; noise, the share in common."""

    kl: float
    ce: float
    line: float
    place: tuple[float, float]
    apart: tuple[float, float]
    noise: tuple[float, float]
    sound: float


@torch.no_grad()
def carried(model: SequenceModel, lines: HiddenPlace) -> Carried:
    batch = lines.sample(256, 2**31)
    out = model.eval()(batch.inputs, coded=True)
    nats = charges(out.logits, lines.vocab_size)
    each = out.logits[..., : lines.vocab_size].log_softmax(-1)
    each = -each.gather(-1, batch.targets.clamp(min=0).unsqueeze(-1))[..., 0]
    each = each.masked_fill(~batch.loss_mask, 0)
    in_bits = [x.sum(1).mean().item() / math.log(2) for x in (nats, each)]
    drawn, letters = draw(model, lines)
    place = lines.places(drawn, letters).view(N_TEXTS, N_ALIKE)
    noise = lines.noise_of(drawn).view(N_TEXTS, N_ALIKE, -1).double()
    return Carried(
        in_bits[0] / nats.shape[1],
        in_bits[1] / lines.length,
        sum(in_bits),
        pairs(lambda a, b: (a == b).double(), place),
        pairs(lambda a, b: (a - b).abs().double(), place),
        pairs(lambda a, b: (a * b).sum(-1) / a.sum(-1).clamp(min=1), noise),
        lines.sound(drawn, letters).double().mean().item(),
    )


def pairs(alike, of: Tensor) -> tuple[float, float]:
    """How alike two lines of one latent are, and two of different ones."""
    within, across = alike(of, of.roll(1, 1)), alike(of, of.roll(1, 0))
    return within.mean().item(), across.mean().item()


def draw(model: SequenceModel, lines: HiddenPlace) -> tuple[Tensor, Tensor]:
    """Lines, N_ALIKE after one another with equal bits, all of one letter, and that letter."""
    n = N_TEXTS * N_ALIKE
    letters = torch.zeros(n, dtype=torch.int64)
    key = torch.arange(1, N_TEXTS + 1).repeat_interleave(N_ALIKE)
    state = with_latent_key(model.init_state(n), key)
    prompt = lines.prompt(letters)
    text = model.generate(prompt, max_new_tokens=lines.length, state=state, seed=0)
    return text[:, 2:], letters


def places(args: argparse.Namespace) -> Iterator[str]:
    lines = HiddenPlace()
    task = SyntheticTask(lines)
    horizon = args.steps * args.batch_size * task.seq_len
    recipe = Recipe(
        horizon, task.seq_len, args.batch_size, args.lr, weight_decay=0.0, optimizer=args.optimizer
    )
    yield (
        f"Lines of {lines.length}: the place takes {math.log2(57):.1f} bits, all {lines.bits:.1f}. "
        f"{args.n_layers} layers of {args.d_model}, {args.n_bits} bits a token, {args.steps} steps "
        f"of {args.batch_size}, seed {args.seed}. Two lines: drawn with equal bits / with others."
    )
    yield ""
    head = ["kappa", "KL, bits/token", "CE, bits/token", "ELBO, bits/line"]
    yield f"| {' | '.join([*head, 'place', 'apart', 'noise', 'sound'])} |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    spec = plain(args.d_model, args.n_layers, lines.vocab_size)
    for kappa in args.kappas:
        free = presets.free_transformer(spec, n_bits=args.n_bits, free_bits=float(kappa))
        training = Training(build_model(free, seed=args.seed), task, recipe, args.seed)
        torch.manual_seed(args.seed)
        with tqdm(total=horizon, unit="tok", unit_scale=True, disable=None) as bar:
            stopped = training.run(horizon, bar.update)
        if stopped is not None:
            yield f"| {kappa} | {stopped} |"
            continue
        found = carried(training.model, lines)
        place, noise = (f"{100 * a:.0f} / {100 * b:.0f} %" for a, b in (found.place, found.noise))
        apart = f"{found.apart[0]:.1f} / {found.apart[1]:.1f}"
        numbers = (
            f"{found.kl:.3f} | {found.ce:.3f} | {found.line:.1f} | {place} | {apart} | {noise}"
        )
        yield f"| {kappa} | {numbers} | {100 * found.sound:.0f} % |"
        yield from shown(training.model, lines, args.show)


def shown(model: SequenceModel, lines: HiddenPlace, n: int) -> Iterator[str]:
    """Three lines of each of n latents, as text."""
    if n:
        signs = f"{'ABCDEFGHIJKLMNOPQRSTUVWXYZ':.{lines.n_letters}}_!>"
        drawn = draw(model, lines)[0].view(N_TEXTS, N_ALIKE, -1)[:n, :3]
        yield from ("".join(signs[i] for i in line) for line in drawn.flatten(0, 1).tolist())


# --------------------------------------------------------------------------------- text


def text(args: argparse.Namespace) -> Iterator[str]:
    task = open_task(args.data)
    vocab_size = task.stem.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    recipe = Recipe(args.tokens, args.seq_len, args.batch_size, args.lr, optimizer=args.optimizer)
    spec = plain(args.d_model, args.n_layers, vocab_size)
    models: dict[str, ModelSpec] = {
        f"free, kappa {kappa}": presets.free_transformer(
            spec, n_bits=args.n_bits, free_bits=float(kappa)
        )
        for kappa in args.kappas
    }
    models = {"plain": twin(next(iter(models.values())), args.n_layers), **models}
    yield (
        f"{args.n_layers} layers of {args.d_model} and an encoder, or {args.n_layers + 1} layers; "
        f"{args.tokens:,} tokens of {task.name}, windows of {args.seq_len}, {args.seeds} seeds; "
        "test bits per byte."
    )
    yield ""
    yield "| model | parameters | bits/byte, all paid for | of it the latent's | lead of plain |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    base: list[float] = []
    for name, model in models.items():
        scores, nats = zip(*(score(model, task, recipe, s) for s in range(args.seeds)), strict=True)
        base = base or list(scores)
        paid = statistics.mean(nats) / math.log(2)
        lead = statistics.mean(s - b for s, b in zip(scores, base, strict=True))
        sd = statistics.stdev(scores) if len(scores) > 1 else 0.0
        yield (
            f"| {name} | {model.cost(1).params:,} | {statistics.mean(scores):.3f} ± {sd:.3f} | "
            f"{paid:.3f} | {lead:+.3f} |"
        )


def score(spec: ModelSpec, task, recipe: Recipe, seed: int) -> tuple[float, float]:
    """Test bits per byte of a training, and the latent's nats of a byte in it."""
    training = Training(build_model(spec, seed=seed), task, recipe, seed)
    torch.manual_seed(seed)
    stopped = training.run(recipe.horizon)
    assert stopped is None, stopped
    seen: list[Tensor] = []
    coded = to_score(training.model.eval(), task)

    def forward(inputs: Tensor) -> ModelOutput:
        out = coded(inputs)
        seen.append(charges(out.logits, task.stem.vocab_size).mean().clamp(min=0))
        return out

    with torch.no_grad():
        values = task.score(forward, "test", training.shape)
    paid = torch.stack(seen).mean().item() if spec.encodes else 0.0
    return values.mean(task.metric), paid


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, kappas, lr in ((places, "1/64 1/8 1 8", 8e-3), (text, "1/8 1/2 1", 8e-3)):
        one = verbs.add_parser(verb.__name__)
        one.set_defaults(run=verb)
        one.add_argument(
            "--kappas", type=Fraction, nargs="+", default=list(map(Fraction, kappas.split()))
        )
        one.add_argument("--d-model", type=int, default=64)
        one.add_argument("--n-layers", type=int, default=4)
        one.add_argument("--n-bits", type=int, default=16)
        one.add_argument("--lr", type=float, default=lr)
        one.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
        if verb is places:
            one.add_argument("--steps", type=int, default=1500)
            one.add_argument("--batch-size", type=int, default=64)
            one.add_argument("--seed", type=int, default=0)
            one.add_argument("--show", type=int, default=0, help="latents of which to show lines")
        else:
            one.add_argument("--data", help="as for kizzasi train; default: the built-in text")
            one.add_argument("--tokens", type=int, default=524288)
            one.add_argument("--seq-len", type=int, default=128)
            one.add_argument("--batch-size", type=int, default=8)
            one.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(arguments)
    for line in args.run(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
