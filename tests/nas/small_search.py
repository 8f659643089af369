"""A search of seconds, and what of it must not depend on where it runs or on being killed."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from kizzasi.nas.search import SearchConfig
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.study.journal import Journal, read_events

SPACE = ArchSearchSpace(
    d_model_options=(16, 32),
    d_state_options=(8, 16),
    n_layers_options=(1, 2),
    model_types=("transformer", "mamba"),
    expand_factor_options=(1.0, 2.0),
    dropout_options=(0.0,),
)


def write_text(folder: Path) -> str:
    path = folder / "text"
    path.write_bytes(b"".join(b"line %d of a small text\n" % (i * i % 997) for i in range(400)))
    return str(path)


def config(data: str) -> SearchConfig:
    return SearchConfig(
        data=data,
        space="families",
        searcher="proxy",
        scheduler="halving",
        final_seeds=1,
        n_params=22_000,
        band=0.4,
        n_pool=6,
        n_best=2,
        n_random=2,
        n_outside=1,
        rungs=(512, 1024),
        lrs=(3e-3, 1e-2),
        final_tokens=1536,
        seq_len=32,
        batch_size=4,
    )


def outcome(folder: Path) -> list[dict]:
    """Every event without its timings, in an order of their own; not on what machine it was."""
    timed = ("seconds", "tokens_per_second")
    events = [
        json.dumps({k: v for k, v in event.items() if k not in timed}, sort_keys=True)
        for event in read_events(folder / "journal.jsonl")
        if event["event"] != "session"
    ]
    assert len(events) == len(set(events)), "an event stands twice"
    return [json.loads(event) for event in sorted(events)]


class KilledError(BaseException):
    """Stands for a kill at an event."""


@contextmanager
def killed_after(n: int):
    """Kill the search inside at the write of its n + 1st event: what was done for it is lost."""
    left, append = iter(range(n)), Journal.append

    def killed(self, event):
        if next(left, None) is None:
            raise KilledError
        return append(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", killed)
        with pytest.raises(KilledError):
            yield
