"""A `SearchConfig` as nested YAML, and which of its settings a search reads at all.

    searcher: {name: regularized, population: 6, sample: 3}
    finals: {n_finalists: 2}

A setting that the chosen searcher, scheduler or screens do not read is refused where it is given,
so that nobody waits for what changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kizzasi.errors import SpecError
from kizzasi.files import write_file
from kizzasi.nas.study.config import INHERIT, SearchConfig
from kizzasi.strict import require, unknown_name

# section -> the settings in it; the first of searcher, scheduler and space is called "name".
SECTIONS: dict[str, tuple[str, ...]] = {
    "data": ("data", "test", "test_fraction"),
    "space": (
        "space",
        "n_params",
        "band",
        "max_state_bytes",
        "max_flops_per_token",
        "max_latency_ms",
        "max_memory_bytes",
        "bounds_len",
    ),
    "searcher": (
        "searcher",
        "n_pool",
        "n_best",
        "n_random",
        "n_outside",
        "population",
        "sample",
        "mutation",
    ),
    "screens": ("screens", "screen_width", "screen_tokens", "proxies"),
    "scheduler": (
        "scheduler",
        "rungs",
        "eta",
        "extrapolate",
        "keep",
        "search_tokens",
        "side_by_side",
    ),
    "training": (
        "optimizer",
        "lrs",
        "matrix_lrs",
        "genes",
        "n_sweep",
        "seq_len",
        "batch_size",
        "score_windows",
        "precision",
        "compile",
        "accumulate",
        "fused",
    ),
    "finals": ("n_finalists", "final_tokens", "final_seeds", "slope_seeds"),
}
NAMED = {"data": "source", "space": "name", "searcher": "name", "scheduler": "name"}
SEARCHERS: dict[str, tuple[str, ...]] = {
    "proxy": ("n_best", "n_random", "n_outside"),
    "random": (),
    "grid": (),
    "regularized": ("population", "sample", "mutation"),
    "evolution": ("population", "sample", "mutation"),
    "local": ("mutation",),
    "nsga2": ("population", "mutation"),
    "tpe": ("population",),
}
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "halving": ("keep",),
    "hyperband": ("eta", "search_tokens", "extrapolate"),
    "asha": ("eta", "search_tokens", "extrapolate"),
    "stopping": ("eta", "search_tokens", "extrapolate"),
    "pasha": ("eta", "search_tokens"),
    "pdh": ("population", "search_tokens"),
}


def unread(config: SearchConfig) -> dict[str, str]:
    """The settings that this search does not read, and who would."""
    read = {*SEARCHERS[config.searcher], *SCHEDULERS[config.scheduler]}
    found: dict[str, str] = {}
    for kind, table in (("searcher", SEARCHERS), ("scheduler", SCHEDULERS)):
        for name in dict.fromkeys(setting for own in table.values() for setting in own):
            who = [own for own, settings in table.items() if name in settings]
            if name not in read:
                chosen = getattr(config, kind)
                found[name] = f"{kind} {chosen} does not read it; {', '.join(who)} would"
    if not config.screens:
        found["screen_width"] = "there are no screens, which it is for"
    if INHERIT not in config.screens:
        found["screen_tokens"] = f"the screen {INHERIT!r} alone reads it"
    bounds = (config.max_state_bytes, config.max_flops_per_token, config.max_latency_ms)
    if {*bounds, config.max_memory_bytes} == {None}:
        found["bounds_len"] = "there are no bounds at a length"
    return found


def require_read(config: SearchConfig, given: Iterable[str]) -> None:
    """Raise SpecError naming a given setting that nothing reads."""
    idle = unread(config)
    for name in given:
        require(name not in idle, name, f"nothing reads it: {idle.get(name)}")


def read_config(path: str | Path) -> tuple[SearchConfig, tuple[str, ...]]:
    """The config in a YAML or JSON file, and the names of the settings that it gives.

    Raises:
        SpecError: unreadable, or a setting is unknown, of a wrong type, or read by nothing.
    """
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except OSError as error:
        raise SpecError(f"{path}: cannot read the config: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"{path}: not YAML: {' '.join(str(error).split()):.200}") from error
    try:
        flat = _flat(found)
        config = SearchConfig.from_dict(flat)
        config.check()
        require_read(config, flat)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    return config, tuple(flat)


def write_config(config: SearchConfig, path: Path) -> None:
    """Write everything that the search reads, in a form that `read_config` reads."""
    text = yaml.safe_dump(nested(config), sort_keys=False)
    write_file(path, lambda file: file.write(text.encode()))


def nested(config: SearchConfig) -> dict[str, Any]:
    """The config by section, without what nothing reads."""
    values, idle = config.to_dict(), unread(config)
    sections: dict[str, Any] = {}
    for section, names in SECTIONS.items():
        renamed = {names[0]: NAMED[section]} if section in NAMED else {}
        sections[section] = {renamed.get(n, n): values[n] for n in names if n not in idle}
    return {**sections, "seed": config.seed}


def _flat(found: Any) -> dict[str, Any]:
    require(isinstance(found, Mapping), "", "a config is a mapping of sections")
    flat: dict[str, Any] = {}
    for section, values in found.items():
        if section == "seed":
            flat["seed"] = values
            continue
        require(section in SECTIONS, str(section), unknown_name(section, [*SECTIONS, "seed"]))
        require(isinstance(values, Mapping), section, "a section is a mapping of settings")
        names = dict(zip(SECTIONS[section], SECTIONS[section], strict=True))
        if section in NAMED:
            names[NAMED[section]] = SECTIONS[section][0]
        for name, value in values.items():
            require(name in names, f"{section}.{name}", unknown_name(name, names))
            flat[names[name]] = value
    return flat
