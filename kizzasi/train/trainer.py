"""A training: run to a budget, scored on held-out windows, saved, gone on with to the last digit.

Glossary
    budget    tokens trained on so far, a multiple of seq_len * batch_size
    curve     [tokens, training loss] pairs, a mean over the steps since the last pair, in the unit
              that the task shows losses in
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.files import write_file
from kizzasi.models import SequenceModel, parameter_groups
from kizzasi.train.distributed import ALONE, Ranks, check_batch, gather, scatter
from kizzasi.train.muon import Muon
from kizzasi.train.recipe import Recipe
from kizzasi.train.seeds import derive_seed
from kizzasi.train.task import Batch, Scores, Shape, Split, Task

UNREADABLE = (OSError, EOFError, ValueError, pickle.UnpicklingError)
CHECK_EVERY = 10  # steps between looks at the loss, which on CUDA wait for the device


class Training:
    """A model in training: run it to a budget, score it, save it, restore it, go on.

    A restored training continues to the last digit as if it had never stopped: batches depend on
    (data_seed, step) alone, and the optimiser's state is part of the checkpoint.

    Args:
        model: from `build_model`, on the device to train on.
        task: what to learn, and how that is scored.
        recipe: how.
        data_seed: which windows are drawn; apart from the seed of the initialisation.
        ranks: the processes that train the model together; see distributed.py.
    """

    def __init__(
        self,
        model: SequenceModel,
        task: Task,
        recipe: Recipe,
        data_seed: int = 0,
        ranks: Ranks = ALONE,
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
        self.task = task.to(self.device)
        groups = parameter_groups(
            model,
            recipe.lr,
            recipe.weight_decay,
            optimizer=recipe.optimizer,
            matrix_lr=recipe.matrix_lr,
        )
        self.peaks = [group["lr"] for group in groups]
        kinds = {"adamw": torch.optim.AdamW, "muon": Muon}
        self.optimizer = kinds[recipe.optimizer](groups, betas=(0.9, 0.95))
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
        ceiling = self.task.ceiling
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
        batch = Batch(*map(self.ranks.rows, batch))
        with self._autocast(), self._chance():
            loss = self.task.loss(self.shared_model(batch.inputs), batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.model.after_step()
        self.step += 1
        return loss.detach()

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
        """The metric on every held-out window of this process."""
        self.model.eval()
        with self._autocast():
            return self.task.score(self.shared_model, split, self.shape)

    def save(self, path: Path) -> None:
        """Write everything that `restore` needs, in one move. Raises OSError, as of a full disk."""
        saved = {
            "model": gather(self.model.state_dict()),
            "optimizer": gather(self.optimizer.state_dict()),
            "step": self.step,
            "curve": self.curve,
            "losses": [self.ranks.mean(loss) for loss in self.losses],
        }
        if self.ranks.rank == 0:
            write_file(path, lambda file: torch.save(saved, file))

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same spec and recipe. Raises CheckpointError."""
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            scatter(self.model, self.optimizer, saved)
            self.step, self.curve = saved["step"], [tuple(pair) for pair in saved["curve"]]
            self.losses = saved["losses"]
        except (*UNREADABLE, RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot continue from it: {error}") from error

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
        on_cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on_cuda)
