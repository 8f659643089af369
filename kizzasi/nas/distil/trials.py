"""Every candidate in every layer: trained in its place, judged by what the whole model then says.

Glossary
    trial       one candidate in one layer: its weights, its error by itself, the damage it does
    damage      KL of the model with this one mixer replaced from the model as it was, nats a token
    own         the layer's own mixer, an option of every layer, without damage

A folder holds journal.jsonl and mixers/, the weights of every trial. What is there already is not
done again; a run that was stopped goes on with the next trial.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from kizzasi.errors import CheckpointError, SpecError, StudyError
from kizzasi.files import write_file
from kizzasi.models import BlockSpec, Mixer, MixerSpec, SequenceModel
from kizzasi.nas.distil.choose import Front, Option
from kizzasi.nas.distil.local import Local, error_of, fit
from kizzasi.nas.distil.passes import ROWS, advance, check_teacher, embedded, logits, made, replaced
from kizzasi.nas.distil.transfer import calibrate, transfer
from kizzasi.nas.distil.yardstick import Yardstick
from kizzasi.nas.study.journal import Journal
from kizzasi.train.seeds import derive_seed
from kizzasi.train.task import Batch

JOURNAL, MIXERS = "journal.jsonl", "mixers"
OWN = "own"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Trial:
    """One candidate in one layer.

    Args:
        layer: its index.
        name, spec: of the candidate.
        taken: values that it took from the layer's own mixer, a share of its own.
        before, error: |y - y'|^2 / |y|^2 of its output on held-out windows, before training and as
            it was kept.
        kl: the damage.
        nats: cross entropy of the held-out text with this one mixer replaced.
        seconds: that it all took.
    """

    layer: int
    name: str
    spec: MixerSpec
    taken: float
    before: float
    error: float
    kl: float
    nats: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        given = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**{**given, "spec": MixerSpec.from_dict(given["spec"])})


@dataclass(frozen=True)
class Trials:
    """All trials of a model.

    Args:
        blocks: of the model.
        trials: in the order in which they were made.
        nats: cross entropy of the held-out text by the model itself.
        folder: where the weights are.
    """

    blocks: tuple[BlockSpec, ...]
    trials: tuple[Trial, ...]
    nats: float
    folder: Path

    def front(self, model: SequenceModel, seq_len: int) -> Front:
        """All plans worth having; their bytes are those of the whole state after seq_len tokens."""
        spec = model.spec
        options: list[list[Option]] = []
        for i, block in enumerate(self.blocks):
            place = spec.layer_context(i)
            named = [(OWN, block.mixer, 0.0)]
            named += [(t.name, t.spec, t.kl) for t in self.trials if t.layer == i]
            costs = [(n, s.cost(place, seq_len, 1).state_bytes, kl) for n, s, kl in named]
            options.append([Option(*each) for each in costs])
        rest = spec.cost(seq_len).state_bytes - sum(each[0].state_bytes for each in options)
        options[0] = [o._replace(state_bytes=o.state_bytes + rest) for o in options[0]]
        return Front(options)

    def find(self, layer: int, name: str) -> Trial:
        """Raises SpecError where there was no such trial."""
        known = {t.name: t for t in self.trials if t.layer == layer}
        if name not in known:
            raise SpecError(f"blocks[{layer}]: no candidate {name!r}; choose from {sorted(known)}")
        return known[name]

    def weights(self, trial: Trial) -> dict[str, Tensor]:
        """Of a trial's mixer, by name. Raises CheckpointError."""
        path = _weights_of(self.folder, trial.layer, trial.name)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot read a tried mixer: {error}; delete the folder and start again"
            ) from error


def try_mixers(
    model: SequenceModel,
    candidates: Mapping[str, MixerSpec],
    train: Tensor,
    held_out: Batch,
    folder: str | Path,
    *,
    how: Local | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    on_step: Callable[[], object] | None = None,
    tell: Tell | None = None,
) -> Trials:
    """Try every candidate in every layer.

    Args:
        model: the teacher, trained; it stays as it is.
        candidates: by names of your own.
        train: (n, t) ids to train the mixers on, in order.
        held_out: inputs and targets (m, t'), for the damage; windows longer than what a candidate
            sees, or its damage is not seen either.
        folder: for the journal and the weights; made if need be, gone on with if there.
        how: the training of one mixer.
        layers: which; None means all.
        seed: of what begins at random.
        on_step: called after every step of a mixer's training.
        tell: told what is going on.

    Raises:
        SpecError: the model cannot be taken apart, a candidate does not fit or is not causal, or a
            name is none.
        StudyError: the folder is of other weights, data or settings.
    """
    folder, how, say = Path(folder), how or Local(), tell or (lambda _: None)
    how.check()
    blocks = check_teacher(model.spec)
    chosen = sorted(set(range(len(blocks)) if layers is None else layers))
    _check(candidates, chosen, model)
    identity = {
        "weights": _digest(model.state_dict().values()),
        "data": _digest((train, *held_out)),
        "local": asdict(how),
        "seed": seed,
    }
    training = model.training
    model.eval()
    try:
        with Journal(folder / JOURNAL) as journal:
            done = _resumed(journal, identity)
            run = _Run(model, candidates, how, seed, folder, on_step)
            say("reading the held-out text")
            yard = Yardstick(model, held_out)
            missing = {
                i: [n for n, s in candidates.items() if _known(done, i, n) != s] for i in chosen
            }
            trials = {(t.layer, t.name): t for t in done if t.name in candidates}
            for trial in run.trials(train, yard, missing, say):
                journal.append({"event": "trial", **trial.to_dict()})
                trials[trial.layer, trial.name] = trial
    finally:
        model.train(training)
    ordered = sorted(trials.items(), key=lambda each: each[0])
    return Trials(blocks, tuple(trial for _, trial in ordered), yard.nats, folder)


class _Place(NamedTuple):
    """A layer, with what passes through it."""

    layer: int
    data: tuple[Tensor, Tensor]  # its own mixer's inputs and outputs, in training
    held: tuple[Tensor, Tensor]  # the same, held out
    before: Tensor  # the held-out stream in front of it


@dataclass(frozen=True)
class _Run:
    """What all trials of a run have in common."""

    model: SequenceModel
    candidates: Mapping[str, MixerSpec]
    how: Local
    seed: int
    folder: Path
    on_step: Callable[[], object] | None

    def trials(
        self, train: Tensor, yard: Yardstick, missing: Mapping[int, list[str]], say: Tell
    ) -> Iterator[Trial]:
        """Layer by layer, the streams advancing with them; no further than the last that misses."""
        last = max((i for i, names in missing.items() if names), default=-1)
        if last < 0:
            return
        stream, held = embedded(self.model, train), embedded(self.model, yard.held_out.inputs)
        for i in range(last + 1):
            say(f"layer {i} of {len(self.model.blocks)}: its inputs and outputs")
            block, before = self.model.blocks[i], held
            x, y, stream = advance(block, stream)
            *seen, held = advance(block, held)
            place = _Place(i, (x, y), (seen[0], seen[1]), before)
            for name in missing.get(i, ()):
                say(f"layer {i} of {len(self.model.blocks)}: {name}")
                yield self._trial(place, name, yard)

    def _trial(self, place: _Place, name: str, yard: Yardstick) -> Trial:
        i, data, held, before = place
        start, spec, model = time.monotonic(), self.candidates[name], self.model
        own = model.blocks[i].get_submodule("mixer")
        assert isinstance(own, Mixer)
        mixer = made(spec, model, i, derive_seed(self.seed, "mixer", i, name))
        mixer.eval()
        share = transfer(mixer, spec, own, model.spec.plain_blocks[i].mixer)
        share /= max(1, sum(p.numel() for p in mixer.parameters()))
        if spec.kind != model.spec.plain_blocks[i].mixer.kind:
            calibrate(mixer, spec, *(part[:ROWS] for part in data))
        if spec.coded:  # no gradient passes through codes
            error = error_of(mixer, *held)
            errors = error, error
        else:
            errors = fit(mixer, *data, held, self.how, self.on_step)
        mixer.to(before.dtype)
        with replaced(model, i, mixer):
            found = yard.measure(lambda rows: logits(model, rows, i), before)
        path = _weights_of(self.folder, i, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {k: v.contiguous().cpu() for k, v in mixer.state_dict().items()}
        write_file(path, lambda file: file.write(to_bytes(weights)))
        return Trial(i, name, spec, share, *errors, *found, time.monotonic() - start)


def _check(
    candidates: Mapping[str, MixerSpec], layers: Sequence[int], model: SequenceModel
) -> None:
    """Raise SpecError unless every candidate can stand in every one of these layers."""
    depth = len(model.spec.blocks)
    for i in layers:
        if not 0 <= i < depth:
            raise SpecError(f"layers: {i} is outside the {depth} layers; count from 0")
    if not candidates:
        raise SpecError("candidates: none; give mixers by name")
    for name, spec in candidates.items():
        if not NAME.fullmatch(name) or name == OWN:
            raise SpecError(f"candidates: {name!r:.60} is no name; use letters, digits, . _ and -")
        spec.check(model.spec.d_model, f"candidates.{name}")
        if not spec.causal or spec.sources or spec.settle(False)[1]:
            raise SpecError(f"candidates.{name}: {spec.kind!r} cannot stand by itself in a layer")


def _resumed(journal: Journal, identity: Mapping[str, Any]) -> list[Trial]:
    """The trials of a journal. Raises StudyError where they are of something else."""
    events = journal.events
    if not events:
        journal.append({"event": "distil", **identity})
        return []
    told = {name: events[0].get(name) for name in identity}
    if events[0].get("event") != "distil" or told != dict(identity):
        other = [name for name in identity if told[name] != identity[name]]
        raise StudyError(
            f"{journal.path}: of other {', '.join(other) or 'things'}; give the same again, or "
            "another folder"
        )
    return [Trial.from_dict(event) for event in events if event.get("event") == "trial"]


def _known(trials: Sequence[Trial], layer: int, name: str) -> MixerSpec | None:
    """The spec under this name in this layer that was tried last."""
    found = [t.spec for t in trials if (t.layer, t.name) == (layer, name)]
    return found[-1] if found else None


def _weights_of(folder: Path, layer: int, name: str) -> Path:
    return folder / MIXERS / f"{layer:03}-{name}.safetensors"


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(whole.numpy())
    return digest.hexdigest()
