"""Give a trained model smaller states: other mixers in its layers, distilled from it.

Every candidate is trained in every layer to do what the layer's own mixer does, and judged by what
it then does to the whole model. Of all hybrids under the budget of state bytes the least harmful is
chosen, and trained for a short while to say what the model said. Without --budget only the curve is
shown, of state bytes against damage.

candidates: window-N (the layer's attention over its last N tokens and the first 4), kv-heads-N,
int8, nf4 (a coded cache), gla, mamba2, short-conv-N; or a YAML file of specs by name.

example:
  kizzasi distil runs/mine --data ~/notes --out runs/small
  kizzasi distil runs/mine --data ~/notes --out runs/small --resume --budget 4MB
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import check_device, check_numbers, checkpoint_of, columns
from kizzasi.errors import DataError, SpecError, StudyError
from kizzasi.progress import Line

if TYPE_CHECKING:
    from kizzasi.models import MixerSpec, ModelSpec, SequenceModel
    from kizzasi.nas.distil import Front, Plan, Trials, Yardstick
    from kizzasi.train.task import Task

CONFIG, STATE, TRIALS, IDS = "config.json", "training.pt", "trials", "ids.npy"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SHOWN = 12  # plans of a curve
SAVE_EVERY = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint folder or file, or a search's folder")
    parser.add_argument("--data", required=True, help="as of train; text goes by its tokenizer")
    parser.add_argument("--out", default="runs/distil", help="folder (default runs/distil)")
    parser.add_argument("--budget", help='state bytes at --context tokens: 4000000, or "4MB"')
    parser.add_argument(
        "--context", type=int, default=4096, help="where states are counted (default 4096 tokens)"
    )
    parser.add_argument(
        "--candidates",
        default="nf4,window-64,short-conv-4",
        help="names, or a file (default nf4,window-64,short-conv-4)",
    )
    parser.add_argument("--resume", action="store_true", help="go on in a folder, with its trials")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    local = parser.add_argument_group("training and judging")
    local.add_argument(
        "--local-steps", type=int, default=100, help="of one mixer by itself (default 100)"
    )
    local.add_argument("--local-lr", type=float, default=2e-3, help="its rate (default 2e-3)")
    local.add_argument(
        "--steps", type=int, default=200, help="of the hybrid (default 200; 0: none)"
    )
    local.add_argument("--lr", type=float, default=3e-4, help="its rate (default 3e-4)")
    local.add_argument("--seq-len", type=int, default=256, help="training window (default 256)")
    local.add_argument("--batch-size", type=int, default=4, help="windows a step (default 4)")
    local.add_argument("--score-len", type=int, default=1024, help="held-out window (default 1024)")
    local.add_argument("--score-windows", type=int, default=4, help="how many (default 4)")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    check_device(args.device)
    check_numbers(args, "context", "local_steps", "seq_len", "batch_size", "score_len")
    if args.steps < 0 or args.score_windows < 1:
        raise SpecError("--steps must be at least 0, and --score-windows at least 1")
    args.budget = None if args.budget is None else bytes_of(args.budget)
    with Line("distil", unit="steps") as line:
        line.say("reading the model")
        return _run(args, line)


def bytes_of(text: str) -> int:
    """Of "4MB" and the like. Raises SpecError."""
    match = re.fullmatch(r"(\d{1,18}) *([KMG]?B|)", text.upper().strip())
    if match is None or match[2] not in UNITS:
        raise SpecError(f'--budget {text!r:.40}: give bytes, or a text such as "4MB"')
    return int(match[1]) * UNITS[match[2]]


def _run(args: argparse.Namespace, line: Line) -> tuple[dict[str, Any], str]:
    import torch

    from kizzasi.models import load
    from kizzasi.nas.distil import Local, Yardstick, try_mixers, windows
    from kizzasi.train.seeds import derive_seed
    from kizzasi.train.task import Shape

    folder, source = Path(args.out), checkpoint_of(args.model)
    _claim(folder, args, source)
    model = load(source, device=args.device, dtype=torch.float32)
    mixers, layers = _candidates(args.candidates, model.spec)
    task = _task(args.data, source, folder, model.spec).to(torch.device(args.device))
    task.check(Shape(max(args.seq_len, args.score_len), args.batch_size), model.spec.stem)
    how, seed = Local(args.local_steps, args.batch_size, args.local_lr), args.seed
    line.count_to(len(mixers) * len(layers) * how.steps + args.steps, unit="steps", at_most=True)
    trials = try_mixers(
        model,
        mixers,
        windows(task, "train", how.steps * how.batch_size, args.seq_len, seed).inputs,
        windows(task, "valid", args.score_windows, args.score_len, seed),
        folder / TRIALS,
        how=how,
        layers=layers,
        seed=seed,
        on_step=lambda: line.update(1),
        tell=line.say,
    )
    front = trials.front(model, args.context)
    result = {"folder": str(folder), "context": args.context, "front": _points(front)}
    if args.budget is None:
        said = f"{folder}: {len(trials.trials)} trials; --resume --budget BYTES makes a hybrid"
        return result, f"{_table(front)}\n{said}"
    plan = front.within(args.budget)
    split = "test" if task.has("test") else "valid"
    text = windows(task, split, args.score_windows, args.score_len, derive_seed(seed, "result"))
    found = _hybrid(args, line, model, task, trials, plan, Yardstick(model, text))
    result |= {"split": split, "layers": list(plan.names), "rows": found}
    rows = [["model", "state bytes", "KL", "nats/token", "perplexity"]]
    for row in found:
        numbers = (row["kl"], row["nats"], row["perplexity"])
        rows.append([row["model"], f"{row['state_bytes']:,}", *(f"{n:.4f}" for n in numbers)])
    return result, f"{columns(rows)}\n{folder}: {_counted(plan.names)}; {split} text"


def _claim(folder: Path, args: argparse.Namespace, source: str) -> None:
    """Refuse what would be overwritten. Raises StudyError."""
    if folder.resolve() == Path(source).resolve():
        raise StudyError(f"{folder}: would replace the model itself; give another --out")
    if (folder / TRIALS).exists() and not args.resume:
        raise StudyError(f"{folder}: holds trials; use --resume, or another --out")
    if (folder / CONFIG).exists() and args.budget is not None and not args.overwrite:
        raise StudyError(f"{folder}: holds a model; use --overwrite or another --out")


def _candidates(text: str, spec: ModelSpec) -> tuple[Mapping[str, MixerSpec], list[int]]:
    """Specs by name, and the layers that they are for: those of the first attention's kind, or all
    if specs were given."""
    from kizzasi.models import MixerSpec
    from kizzasi.nas.distil import ready_made

    if Path(text).suffix in (".yaml", ".yml", ".json"):
        from kizzasi.documents import read_document

        given = read_document(text, "candidates")
        if not isinstance(given, Mapping):
            raise SpecError(f"{text}: expected mixers by name")
        specs = {str(k): MixerSpec.from_dict(v, f"{text}: {k}") for k, v in given.items()}
        return specs, list(range(len(spec.blocks)))
    mixers = [block.mixer for block in spec.plain_blocks]
    own = next((mixer for mixer in mixers if mixer.kind == "attention"), mixers[0])
    found = ready_made([name for name in text.split(",") if name], own, spec.d_model)
    return found, [i for i, mixer in enumerate(mixers) if mixer == own]


def _task(data: str, source: str, folder: Path, spec: ModelSpec) -> Task:
    """What the model reads: ids, bytes, or text by its own tokenizer, whose ids are kept."""
    import numpy as np

    from kizzasi.files import write_file
    from kizzasi.models import Tokens
    from kizzasi.models.checkpoints import companions_of
    from kizzasi.models.checkpoints.tokenizers import load_tokenizer
    from kizzasi.train.bytes import ByteText
    from kizzasi.train.open import open_task
    from kizzasi.train.token_ids import TokenIds

    task = open_task(data, apart=folder)
    if not isinstance(spec.stem, Tokens) or not isinstance(task, (ByteText, TokenIds)):
        raise DataError(f"{data}: models of text alone are distilled; give text or ids")
    if not isinstance(task, ByteText) or not companions_of(Path(source)).files:
        return task
    tokenizer = load_tokenizer(Path(source), spec.stem.vocab_size)
    parts = [
        bytes(p.tolist()).decode(errors="replace") for p in (task.train, task.valid, task.test)
    ]
    ids = [tokenizer.encode(part) for part in parts]
    folder.mkdir(parents=True, exist_ok=True)
    whole = np.array([i for part in ids for i in part], np.uint32)
    write_file(folder / IDS, lambda file: np.save(file, whole))
    shares = (len(ids[1]) / len(whole), len(ids[2]) / len(whole))
    return TokenIds.open(
        folder / IDS,
        vocab_size=spec.stem.vocab_size,
        valid_fraction=shares[0],
        test_fraction=shares[1],
    )


def _hybrid(
    args: argparse.Namespace,
    line: Line,
    model: SequenceModel,
    task: Task,
    trials: Trials,
    plan: Plan,
    yard: Yardstick,
) -> list[dict[str, Any]]:
    """Assemble, distil, save; a row for the teacher, the hybrid as assembled, and as distilled."""
    from kizzasi.models.checkpoints import save
    from kizzasi.nas.distil import Distance, Distilled, assemble
    from kizzasi.train.recipe import Recipe
    from kizzasi.train.trainer import Training

    line.say("assembling")
    student = assemble(model, trials, plan.names)
    rows = [_row("teacher", model.spec, Distance(0.0, yard.nats), args.context)]
    rows.append(_row("assembled", student.spec, yard.of(student), args.context))
    folder = Path(args.out)
    if args.steps:
        recipe = Recipe(
            args.steps * args.seq_len * args.batch_size,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            lr=args.lr,
            weight_decay=0.0,
        )
        recipe.check()
        training = Training(student, Distilled(task, model), recipe, args.seed)
        state = folder / STATE
        if state.exists():
            training.restore(state)
        line.say("distilling")
        while training.step < args.steps:
            budget = min(training.step + SAVE_EVERY, args.steps) * recipe.tokens_per_step
            if reason := training.run(budget, lambda _: line.update(1)):
                raise StudyError(f"{folder}: {reason}")
            training.save(state)
        student.eval()
        rows.append(_row("distilled", student.spec, yard.of(student), args.context))
    line.say("saving")
    save(student, folder, overwrite=True, like=checkpoint_of(args.model))
    (folder / STATE).unlink(missing_ok=True)
    return rows


def _row(name: str, spec: ModelSpec, found: Any, context: int) -> dict[str, Any]:
    import math

    size = spec.cost(context).state_bytes
    far = {"kl": found.kl, "nats": found.nats, "perplexity": math.exp(found.nats)}
    return {"model": name, "state_bytes": size, **far}


def _shown(front: Front) -> list[Plan]:
    """The ends of a curve, and some plans between, evenly spread over the logarithm of bytes."""
    import numpy as np

    sizes = np.log(front.state_bytes)
    at = np.searchsorted(sizes, np.linspace(sizes[0], sizes[-1], SHOWN))
    return [front[int(i)] for i in dict.fromkeys(at.clip(max=len(front) - 1).tolist())]


def _points(front: Front) -> list[dict[str, Any]]:
    return [plan._asdict() for plan in _shown(front)]


def _table(front: Front) -> str:
    rows = [["mixers", "state bytes", "sum of KL"]]
    for plan in _shown(front):
        rows.append([_counted(plan.names), f"{plan.state_bytes:,}", f"{plan.damage:.4f}"])
    return columns(rows)


def _counted(names: tuple[str, ...]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
