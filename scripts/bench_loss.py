"""Peak memory and time of one training step: logits whole, and some tokens at a time.

    python scripts/bench_loss.py --vocab 131072 --tokens 2048

Each way runs in a process of its own; peak is what the step adds to the resident set. Both losses
and gradients are compared first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixers import MambaSpec


def step(vocab: int, tokens: int, d_model: int, chunked: bool) -> tuple[float, float, float, float]:
    """Loss, norm of all gradients, MiB above the model's own, seconds."""
    torch.set_num_threads(1)
    model = build_model(ModelSpec(d_model, (BlockSpec(MambaSpec()),), Tokens(vocab)))
    x = torch.randint(vocab, (1, tokens), generator=torch.Generator().manual_seed(0))
    model.loss(x[:, :2], x[:, :2]).backward()  # gradients exist
    model.zero_grad(set_to_none=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = model.loss(x, x) if chunked else model(x).loss(x)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    norm = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
    return loss.item(), norm**0.5, peak / 1024, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=64)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for chunked in (False, True):
        with context.Pool(1) as pool:
            rows.append(pool.apply(step, (args.vocab, args.tokens, args.d_model, chunked)))
    (a, g, whole, slow), (b, h, parts, fast) = rows
    torch.testing.assert_close(torch.tensor([a, g]), torch.tensor([b, h]), rtol=1e-4, atol=0)
    print(f"vocabulary {args.vocab}, {args.tokens} tokens, d_model {args.d_model}")
    print(f"whole      {whole:8.0f} MiB  {slow:6.2f} s")
    print(f"in chunks  {parts:8.0f} MiB  {fast:6.2f} s   {parts / whole:.3f} of the memory")


if __name__ == "__main__":
    main()
