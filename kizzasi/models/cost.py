"""What a model costs, computed from its spec before any tensor exists.

Symbols: b batch, t seq_len, d d_model. One multiply-add counts as 2 flops.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Analytic cost of one forward pass over (batch, seq_len) inputs.

    params          parameters, shared ones once.
    active_params   parameters that one token uses (less than params for mixtures of experts).
    flops           all matrix products and convolutions of the parallel form, torch engine: what
                    `torch.utils.flop_counter.FlopCounterMode` counts. Elementwise work and FFTs
                    are not counted, here or there.
    state_bytes     size of the state after seq_len tokens, for a float32 model.
    """

    params: int = 0
    active_params: int = 0
    flops: int = 0
    state_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Cost(
            self.params + other.params,
            self.active_params + other.active_params,
            self.flops + other.flops,
            self.state_bytes + other.state_bytes,
        )


def dense(params: int, *, flops: int = 0, state_bytes: int = 0) -> Cost:
    """A part whose parameters are all used by every token."""
    return Cost(params, params, flops, state_bytes)


def linear(n_tokens: int, n_in: int, n_out: int, *, bias: bool = False) -> Cost:
    """A Linear layer applied to n_tokens vectors."""
    return dense(n_in * n_out + bias * n_out, flops=2 * n_tokens * n_in * n_out)


def norm(kind: str, d: int) -> Cost:
    """A norm of a `NormKind`."""
    return dense({"layer": 2 * d, "scale": 1}.get(kind, d))
