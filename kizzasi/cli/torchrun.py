"""Joining and leaving the other processes that torchrun started."""

from __future__ import annotations

import os

from kizzasi.train.distributed import ALONE, Parallel, Ranks


def join(device: str, how: Parallel) -> tuple[Ranks, str]:
    """Meet the others, if torchrun started this process.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, the GPU of this process's local rank).

    Returns:
        This process's place, and its device.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE, device
    import torch
    import torch.distributed as dist

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    beside = int(os.environ["LOCAL_WORLD_SIZE"])
    return Ranks(dist.get_rank(), dist.get_world_size(), how, beside), device


def restarted() -> bool:
    """torchrun started this process anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def leave(ranks: Ranks) -> None:
    """Part from the others; all but the first end here, their work being done."""
    if ranks.world > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
        if ranks.rank:
            raise SystemExit(0)
