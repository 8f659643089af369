"""What a document says about training, and the budgets that it sets itself."""

from __future__ import annotations

import math
from typing import Any

from kizzasi.models import ModelSpec
from kizzasi.nas.pipelines.document import Budget, Train
from kizzasi.nas.pipelines.misfits import Findings

BETAS = (0.9, 0.95)  # the trainer's
FORWARD_AND_BACK = 3  # a training step costs about three forward passes
NEAR = 0.1


def recipe_of(train: Train, findings: Findings) -> dict[str, Any]:
    """The fields of a `Recipe` that a document sets."""
    if train.dtype is not None:
        rule = (
            f"{train.dtype}: the device decides; training runs in float32 on a CPU, and in "
            "bfloat16 autocast, which needs no loss scale, on CUDA"
        )
        findings.drop("train.dtype", rule)
    if train.betas and tuple(train.betas) != BETAS:
        findings.drop("train.betas", f"{list(train.betas)}: the trainer's are {list(BETAS)}")
    named = {"lr": train.lr, "weight_decay": train.wd, "clip": train.clip}
    found: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
    found["seq_len"] = train.ctx_len
    budget = train.budget
    if budget is None:
        return found
    if budget.tokens_per_step is not None:
        found["batch_size"] = _batch(budget.tokens_per_step, train.ctx_len, findings)
    if budget.max_steps is not None:
        found["steps"] = budget.max_steps
    return found


def _batch(tokens: int, ctx_len: int, findings: Findings) -> int:
    """Windows of a step."""
    rows = max(1, tokens // ctx_len)
    if rows * ctx_len != tokens:
        rule = f"{tokens} tokens are no whole number of windows of {ctx_len}"
        findings.set("train.budget.tokens_per_step", rule, rows * ctx_len)
    return rows


def check_budgets(spec: ModelSpec, train: Train, budget: Budget | None, findings: Findings) -> None:
    """Find what the model takes beyond what its document allows."""
    own = train.budget
    if own is not None and own.flops_per_step is not None:
        _check_step(spec, train, own.tokens_per_step or train.ctx_len, findings)
    if budget is None:
        return
    cost = spec.cost(train.ctx_len)
    target = budget.params_target
    if target is not None and abs(cost.params - target) > NEAR * target:
        rule = (
            f"{cost.params:,} parameters, embeddings included, are not within a tenth of "
            f"{target:,.0f}"
        )
        remedy = "change d_model, n_layers, ffn.mult or train.vocab_size, or the target"
        findings.set("budget.params_target", rule, cost.params, remedy)
    flops = budget.flops_target
    per_token = math.ceil(cost.flops / train.ctx_len)
    if isinstance(flops, str):
        rule = f"{flops!r} names no number, and a file knows no other"
        findings.drop("budget.flops_target", rule, "give flops per token, or leave it out")
    elif flops is not None and per_token > flops:
        rule = f"a token takes {per_token:,} flops forward, more than {flops:,.0f}"
        findings.set("budget.flops_target", rule, float(per_token))


def _check_step(spec: ModelSpec, train: Train, tokens: int, findings: Findings) -> None:
    allowed = 0.0 if train.budget is None else train.budget.flops_per_step or 0.0
    rows = max(1, tokens // train.ctx_len)
    row = FORWARD_AND_BACK * spec.training_flops(train.ctx_len)
    if rows * row <= allowed:
        return
    rule = (
        f"a step of {rows * train.ctx_len:,} tokens takes {rows * row:,} flops forward and "
        f"backward, more than {allowed:,.0f}"
    )
    fitting = int(allowed // row)
    if fitting:
        path, value = "train.budget.tokens_per_step", fitting * train.ctx_len
    else:
        path, value = "train.budget.flops_per_step", float(row)
    remedy = f"give {path.rpartition('.')[2]} {value:,.0f}"
    changes = [(path, value)]
    if not fitting and rows > 1:
        changes.append(("train.budget.tokens_per_step", train.ctx_len))
    findings.add("train.budget.flops_per_step", rule, remedy, *changes)
