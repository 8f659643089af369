"""One training in several processes, started by torchrun: on one machine or many.

Every process computes its rows of each batch, and gradients are averaged, so that the losses are
those of a single process. A saved training is always the whole one: it may be continued by another
number of processes, or by one.

    ddp    every process holds the whole model (Li et al. 2020, arXiv:2006.15704)
    fsdp   parameters, gradients and optimiser states are sharded, gathered block by block
           (Zhao et al. 2023, arXiv:2304.11277; torch's `fully_shard`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models import SequenceModel, build_model

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Ranks:
    """This process's place among the `world` processes that train one model together, `beside` of
    them on this machine."""

    rank: int = 0
    world: int = 1
    how: Parallel = "ddp"
    beside: int = 1

    def share(self, model: SequenceModel) -> nn.Module:
        """What to call in place of the model. fsdp shards the model's own parameters."""
        if self.world == 1:
            return model
        if self.how == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        return model

    def rows(self, batch: Tensor) -> Tensor:
        """This process's share of a batch's rows."""
        return batch[self.rank :: self.world]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.sum(x) / self.world

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def whole(self, model: SequenceModel) -> SequenceModel:
        """The model with all its parameters, on the CPU if it was sharded. All ranks call it."""
        if self.world == 1 or self.how == "ddp":
            return model
        state = gather(model.state_dict())
        made = build_model(model.spec, device="meta").to_empty(device="cpu")
        made.load_state_dict(state)
        return made


ALONE = Ranks()


def check_batch(ranks: Ranks, batch_size: int) -> None:
    """Raises SpecError unless a batch can be shared evenly."""
    if batch_size % ranks.world:
        raise SpecError(
            f"batch_size: {batch_size} rows cannot be shared evenly by {ranks.world} processes; "
            f"give a multiple of {ranks.world}"
        )


def gather(tree: Any) -> Any:
    """Every sharded tensor in nested dicts and lists made whole. Every process calls it."""
    if isinstance(tree, Mapping):
        return {key: gather(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gather(value) for value in tree]
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


def scatter(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load whole states of model and optimiser, each process keeping its shards."""
    shards = model.state_dict()
    model.load_state_dict({name: _like(shards[name], t) for name, t in saved["model"].items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, values in saved["optimizer"]["state"].items():
        own = parameters[i]
        state[i] = {k: _like(own, v) if v.ndim else v for k, v in values.items()}
    optimizer.load_state_dict({**saved["optimizer"], "state": state})


def _like(shard: Tensor, whole: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(shard, DTensor):
        return whole
    return distribute_tensor(whole.to(shard.device), shard.device_mesh, shard.placements)
