"""A training: run to a budget, scored on held-out windows, saved, gone on with to the last digit.

Glossary
    budget    tokens trained on so far, a multiple of seq_len * batch_size
    curve     [tokens, training loss] pairs, a mean over the steps since the last pair, in the unit
              that the task shows losses in
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.files import open_regular, write_file
from kizzasi.models import ModelOutput, ModelSpec, SequenceModel, Tokens, parameter_groups
from kizzasi.models.mup import mup_groups
from kizzasi.train.distributed import ALONE, Ranks, check_batch, gather, scatter
from kizzasi.train.muon import Muon
from kizzasi.train.recipe import Recipe
from kizzasi.train.seeds import derive_seed
from kizzasi.train.task import Batch, Forward, Scores, Shape, Split, Task

UNREADABLE = (OSError, EOFError, ValueError, pickle.UnpicklingError)
DAMAGED = (*UNREADABLE, RuntimeError, LookupError, TypeError, AttributeError, OverflowError)
CHECK_EVERY = 10  # steps between looks at the loss, which on CUDA wait for the device


def to_score(model: Callable[..., ModelOutput], task: Task) -> Forward:
    """The function that a task scores: of a language model with latent bits, one that pays for them
    (`SequenceModel.forward(coded=True)`).
    """
    return partial(model, coded=task.metric.of_loss and isinstance(task.stem, Tokens))


class Training:
    """A model in training: run it to a budget, score it, save it, restore it, go on.

    A restored training continues to the last digit as if it had never stopped: batches depend on
    (data_seed, step) alone, and the optimiser's state is part of the checkpoint.

    Args:
        model: from `build_model`, on the device to train on.
        task: what to learn, and how that is scored.
        recipe: how.
        data_seed: which windows are drawn; apart from the seed of the initialisation.
        base: the model of another width that the recipe's rates are of, carried over by muP; the
            model is then that of `mup_spec(spec, base)`. None: they are of this model.
        ranks: the processes that train the model together; see distributed.py.
    """

    def __init__(
        self,
        model: SequenceModel,
        task: Task,
        recipe: Recipe,
        data_seed: int = 0,
        ranks: Ranks = ALONE,
        base: ModelSpec | None = None,
    ) -> None:
        recipe.check()
        check_batch(ranks, recipe.batch_size)
        self.shape = Shape(
            recipe.seq_len, recipe.batch_size, recipe.score_windows, ranks.rank, ranks.world
        )
        task.check(self.shape, model.spec.stem)
        self.model, self.recipe, self.data_seed, self.ranks = model, recipe, data_seed, ranks
        self.device = next(model.parameters()).device
        self.shared_model = ranks.share(model)
        self.forward = torch.compile(self.shared_model) if recipe.compile else self.shared_model
        self.task = task.to(self.device)
        self.base = base
        make = parameter_groups if base is None else partial(mup_groups, base=base)
        groups = make(
            model,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            optimizer=recipe.optimizer,
            matrix_lr=recipe.matrix_lr,
        )
        self.peaks = [group["lr"] for group in groups]
        if recipe.optimizer == "muon":
            self.optimizer: torch.optim.Optimizer = Muon(groups, betas=(0.9, 0.95))
        else:
            fused = True if recipe.fused else None
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)
        self.dtype = _autocast_dtype(recipe.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.notes: dict[str, Any] = {}  # saved beside the identity: no part of it
        self.step = 0
        self.curve: list[tuple[int, float]] = []
        self.losses: list[Tensor] = []  # since the curve's last point

    @property
    def tokens(self) -> int:
        return self.step * self.recipe.tokens_per_step

    def run(self, tokens: int, on_step: Callable[[int], object] | None = None) -> str | None:
        """Train until the budget is reached.

        Args:
            tokens: the budget, counted from the very first step.
            on_step: called with the number of tokens of each finished step.

        Returns:
            None, or why the training had to stop: a loss that is not finite, or has diverged.
        """
        recipe, last = self.recipe, self.recipe.steps(tokens)
        stream = self.task.batches("train", self.data_seed, self.step, self.shape)
        ceiling, stem = self.task.ceiling, self.model.spec.stem
        if isinstance(stem, Tokens):  # a model of more ids than the data have begins higher
            ceiling = max(ceiling, 2 * math.log(stem.vocab_size))
        self.model.train()
        while self.step < last:
            self.losses.append(self._step(next(stream)))
            if self.step % CHECK_EVERY == 0 or self.step == last:
                mean = self.ranks.mean(torch.stack(self.losses).mean()).item()
                self.losses.clear()
                self.curve.append((self.tokens, mean * self.task.curve_scale))
                if not math.isfinite(mean):
                    return f"the loss became {mean} before step {self.step}; lower the lr"
                if mean > ceiling:
                    return f"diverged: a loss of {mean:.3g} at step {self.step}; lower the lr"
            if on_step is not None:
                on_step(recipe.tokens_per_step)
        return None

    def _step(self, batch: Batch) -> Tensor:
        factor = self.recipe.factor(self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        loss = self._backward(Batch(*map(self.ranks.rows, batch)))
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.after_step()
        self.step += 1
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of the mean loss of all parts of a batch; and that loss."""
        self.optimizer.zero_grad(set_to_none=True)
        n, losses = self.recipe.accumulate, []
        with self._chance():
            for part in zip(*(whole.chunk(n) for whole in batch), strict=True):
                piece = Batch(*part)
                with self._autocast():
                    loss = self.task.loss(self.forward(piece.inputs), piece) / n
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
        return torch.stack(losses).sum()

    def score(self, split: Split = "valid") -> float:
        """The task's metric on held-out windows; every window starts from an empty state."""
        values = self.values(split)
        weights = values.weights.sum()
        sums = torch.stack([(values.values * values.weights).sum(), weights])
        whole, total = self.ranks.sum(sums).tolist()
        mean = torch.tensor([whole / total], dtype=torch.float64)
        return Scores(mean, torch.ones_like(mean)).mean(self.task.metric)

    @torch.no_grad()
    def values(self, split: Split = "valid") -> Scores:
        """The metric on every held-out window of this process; of a language model with latent
        bits, these included (`SequenceModel.forward(coded=True)`)."""
        self.model.eval()
        with self._autocast():
            return self.task.score(to_score(self.shared_model, self.task), split, self.shape)

    @property
    def identity(self) -> dict[str, Any]:
        """What a training is; one that differs in any of it is another one."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "score_windows"}
        return {
            "spec": self.model.spec.digest,
            "data": self.task.digest,
            "data_seed": self.data_seed,
            **({} if self.base is None else {"base": self.base.digest}),
            **recipe,
        }

    def save(self, path: Path) -> None:
        """Write everything that `restore` needs, in one move. Raises OSError, as of a full disk."""
        saved = {
            "model": gather(self.model.state_dict()),
            "optimizer": gather(self.optimizer.state_dict()),
            "step": self.step,
            "curve": self.curve,
            "losses": [self.ranks.mean(loss) for loss in self.losses],
            "scaler": self.scaler.state_dict(),
            "identity": self.identity,
            "notes": self.notes,
        }
        if self.ranks.rank == 0:
            write_file(path, lambda file: torch.save(saved, file))

    def restore(self, path: Path, saved: Mapping[str, Any] | None = None) -> None:
        """Continue from a checkpoint of the same training; only its horizon may have grown.

        Args:
            path: of the checkpoint.
            saved: what `read_training` found there; None reads it.

        Raises:
            CheckpointError: it is damaged, or of another training; names what differs.
        """
        saved = read_training(path, self.device) if saved is None else saved
        self._require_same(path, saved)
        try:
            step, curve, losses = saved["step"], saved["curve"], saved["losses"]
            _check_progress(step, curve, losses, self.recipe.steps(self.recipe.horizon))
            scatter(self.model, self.optimizer, saved)
            self.scaler.load_state_dict(saved.get("scaler", {}))
            self.step, self.curve, self.losses = step, [tuple(pair) for pair in curve], losses
        except (*DAMAGED, CheckpointError) as error:
            raise _cannot_continue(path, error) from error

    def _require_same(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Checkpoints of version 0.1 do not say what they are, and are taken as they come."""
        told, own = saved.get("identity"), {"base": None, **self.identity}
        if not isinstance(told, Mapping):
            return
        told = {"base": None, **told}
        grown = "horizon" in told and told["horizon"] <= own["horizon"]
        other = [
            k for k in own if k in told and told[k] != own[k] and not (k == "horizon" and grown)
        ]
        if other:
            given = ", ".join(f"{k}: {told.get(k)!s:.40} then, {own[k]!s:.40} now" for k in other)
            raise _cannot_continue(path, f"it is another training; {given}")

    @contextmanager
    def _chance(self) -> Iterator[None]:
        """Dropout drawn from (data_seed, step) alone; torch's own stream is left as it was."""
        if self.model.spec.dropout == 0:
            yield
            return
        on_cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_cuda):
            own = (self.ranks.rank,) if self.ranks.rank else ()
            torch.random.manual_seed(derive_seed(self.data_seed, "dropout", self.step, *own))
            yield

    def _autocast(self) -> torch.autocast:
        half = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    return named.get(precision, usual)


def read_training(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `Training.save` wrote. Raises CheckpointError; nothing in the file is run."""
    try:
        with open_regular(path) as file:
            if not zipfile.is_zipfile(file):
                raise CheckpointError("no checkpoint of a training")
            _require_plain(file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            saved = torch.load(file, map_location=device, weights_only=True)
    except (*DAMAGED, CheckpointError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _cannot_continue(path, error) from error
    if not isinstance(saved, dict):
        raise _cannot_continue(path, "no checkpoint of a training")
    return saved


def _require_plain(file: BinaryIO, size: int) -> None:
    """torch.save compresses nothing: what unpacks to more than the file has is a bomb."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        whole = sum(part.file_size for part in parts)
    if whole > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise CheckpointError("compressed, and torch.save never compresses")


def _check_progress(step: Any, curve: Any, losses: Any, last: int) -> None:
    """Raise CheckpointError unless these can be of a training of so many steps."""
    if type(step) is not int or not 0 <= step <= last:
        raise CheckpointError(f"step: {step!s:.40}; expected a whole number from 0 to {last}")
    pairs = isinstance(curve, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_number, pair))
        for pair in curve
    )
    if not pairs:
        raise CheckpointError("curve: expected pairs of tokens and loss")
    if not isinstance(losses, list) or not all(
        isinstance(loss, Tensor) and loss.ndim == 0 for loss in losses
    ):
        raise CheckpointError("losses: expected a list of single numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cannot_continue(path: Path, error: object) -> CheckpointError:
    """Torch's own messages take several lines and give dangerous advice."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{path}: cannot continue from it: {reason:.300}")
