"""Seeds of the parts of a run, from names and indices and never from timing."""

import hashlib
import json


def derive_seed(run_seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**63) for one part of a run, from names and indices and never from timing.

        first 63 bits of sha256(JSON of [run_seed, *parts])

    Args:
        run_seed: the seed that the user gave.
        parts: what it is for, such as "data", or "trial" and its index. 1 and "1" differ.
    """
    text = json.dumps((run_seed, *parts), allow_nan=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
