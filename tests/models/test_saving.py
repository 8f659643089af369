"""What is saved can be loaded: read back, refused with the remedy, sharded, never over another."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as reference
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load, load_state
from kizzasi.models.build import skeleton
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.checkpoints import save
from kizzasi.models.checkpoints.storage.files import open_file, safetensors
from kizzasi.models.mixers import AttentionSpec, MambaSpec

BLOCK = BlockSpec(MambaSpec(d_state=4), SwiGLUSpec(24))
SPEC = ModelSpec(16, (BLOCK,) * 3, Tokens(17))
IDS = torch.arange(22).view(2, 11) % 17


def model(seed=1, **changes):
    return build_model(SPEC.replace(**changes), seed=seed).eval()


def first(m):
    return m.blocks[0].mixer.in_proj


class Adapted(nn.Module):
    """What adapters look like from outside."""

    def __init__(self, inner):
        super().__init__()
        self.base_layer, self.lora_A = inner, nn.Linear(16, 2)


def cut(m):
    m.blocks = m.blocks[:2]


def other_head(m):
    m.stem.lm_head = nn.Linear(16, 3, bias=False)


def tied(m):
    m.stem.lm_head.weight = m.stem.embedding.weight


def shared(m):
    m.blocks[1] = m.blocks[0]


def adapted(m):
    m.blocks[0].mixer.in_proj = Adapted(m.blocks[0].mixer.in_proj)


CHANGES = {
    "pruned": (lambda m: prune.l1_unstructured(first(m), "weight", 0.5), "prune.remove"),
    "normed": (lambda m: parametrizations.weight_norm(first(m)), "remove_parametrizations"),
    "adapted": (adapted, "merge them"),
    "cut": (cut, r"missing blocks\.2\..*change the spec instead of the modules"),
    "other head": (other_head, r"lm_head\.weight is \(3, 16\), not \(17, 16\)"),
    "tied by hand": (tied, r"are one tensor .* say so in the spec \(tie_head"),
    "shared layers": (shared, r"are one tensor .* a shared layer"),
    "no values": (lambda m: m.to("meta"), "is a meta tensor"),
}


@pytest.mark.parametrize("format", ["kizzasi", "mamba"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_could_not_be_loaded_is_refused_with_the_remedy(tmp_path, change, format):
    m = model(blocks=(BlockSpec(MambaSpec(d_state=4)),) * 3)
    apply, remedy = CHANGES[change]
    apply(m)
    with pytest.raises(CheckpointError, match=f"cannot save.*{remedy}"):
        save(m, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_the_remedies_are_right(tmp_path):
    m = model()
    prune.l1_unstructured(first(m), "weight", 0.5)
    parametrizations.weight_norm(m.blocks[1].mixer.in_proj)
    wanted = m(IDS).logits
    prune.remove(first(m), "weight")
    parametrize.remove_parametrizations(m.blocks[1].mixer.in_proj, "weight")
    m.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")(IDS).logits, wanted)


def test_wrappers_are_seen_through(tmp_path):
    m = model()
    wanted = m(IDS).logits
    m.blocks[0] = torch.compile(m.blocks[0], backend="eager")
    m.save_pretrained(tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(IDS).logits, wanted)
    assert "blocks.0.mixer.A_log" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("part", ["stem", "stem.lm_head"])
def test_a_model_of_two_dtypes_keeps_the_wider(tmp_path, part):
    m = model()
    m.get_submodule(part).bfloat16()
    m.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for (name, a), b in zip(m.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.float(), b), name
    m = model().bfloat16()
    m.save_pretrained(tmp_path / "low")
    dtypes = {n: p.dtype for n, p in load(tmp_path / "low").named_parameters()}
    assert dtypes == {n: p.dtype for n, p in m.named_parameters()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


def test_a_model_is_never_overwritten_unasked(tmp_path):
    model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for attempt in (lambda: model(2).save_pretrained(tmp_path), lambda: save(model(2), tmp_path)):
        with pytest.raises(CheckpointError, match=r"holds a model already .* overwrite=True"):
            attempt()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model(2).save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("format", ["kizzasi", "llama"])
def test_shards(tmp_path, format):
    m = model()
    if format == "llama":
        block = BlockSpec(AttentionSpec(4, 2, head_dim=4), SwiGLUSpec(24))
        m = build_model(SPEC.replace(blocks=(block,) * 3)).eval()
    save(m, tmp_path, format, max_shard_size="3KB")
    names = sorted(p.name for p in tmp_path.iterdir())
    n = len(names) - 2
    assert n > 2
    assert names[:3] == ["config.json", f"model-00001-of-{n:05}.safetensors", names[2]]
    assert names[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / names[-1]).read_text())
    assert set(index["weight_map"].values()) == set(names[1:-1])
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in m.parameters())
    assert all((tmp_path / name).stat().st_size < 7000 for name in names[1:-1])
    assert torch.equal(load(tmp_path)(IDS).logits, m(IDS).logits)
    save(m, tmp_path, format, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for size in ("3 pounds", 0, -1, True, 1.5):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            save(m, tmp_path / "x", format, max_shard_size=size)


def test_files_are_those_of_safetensors(tmp_path):
    """Byte for byte, as its own program writes them."""
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.int8]
    tensors = {f"t{i}": torch.randn(3, 2).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"empty": torch.zeros(0, 3), "one": torch.ones(()), "é": torch.ones(5)[::2]}
    with open(tmp_path / "a", "wb") as file:
        safetensors(tensors)(file)
    plain = {name: t.contiguous() for name, t in tensors.items()}
    assert (tmp_path / "a").read_bytes() == reference(plain, {"format": "pt"})
    stored = open_file(tmp_path / "a")
    assert all(torch.equal(stored[name].read(), t) for name, t in tensors.items())


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    model = build_model(SPEC)
    model.save_pretrained(folder)
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_disk_that_forgets_is_noticed(tmp_path, monkeypatch):
    """What is not read back as written does not replace what was there."""
    model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    sync = os.fsync

    def spoil(place):
        if os.fstat(place).st_size > 5000:
            os.pwrite(place, b"\x00\x01\x02\x03", 5000)
        sync(place)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(CheckpointError, match="not read back as written"):
        model(2).save_pretrained(tmp_path, overwrite=True)
    state = model()(torch.arange(2048).view(32, 64) % 17).state
    with pytest.raises(CheckpointError, match="not read back as written"):
        state.save(tmp_path / "state")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_states_have_the_permissions_of_the_umask(tmp_path):
    m = model()
    state = m(IDS).state
    state.save(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o666 & ~_umask()
    again = load_state(tmp_path / "state", m.init_state(1))
    assert torch.equal(m.step(IDS[:, 0], again).logits, m.step(IDS[:, 0], state).logits)


def _umask():
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_loading_draws_nothing_and_goes_straight_to_its_dtype(tmp_path, monkeypatch):
    m = model()
    m.save_pretrained(tmp_path)

    def fresh(dtype):
        return skeleton(m.spec, torch.device("meta")).to(dtype or torch.float32)

    def never(*args, **options):
        raise AssertionError("initialised")

    monkeypatch.setattr(type(m), "reset_parameters", never)
    before = torch.random.get_rng_state()
    for dtype in (None, torch.float64, torch.bfloat16):
        again = load(tmp_path, dtype=dtype)
        wanted = {n: p.dtype for n, p in fresh(dtype).named_parameters()}
        assert {n: p.dtype for n, p in again.named_parameters()} == wanted
        assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    meta = load(tmp_path, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    with pytest.raises((SpecError, RuntimeError, AssertionError)):
        load(tmp_path, device="cuda:99")


PEAK = """
import os, sys, torch
from pathlib import Path
from kizzasi.models import load
def memory(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])
folder = Path(sys.argv[1])
torch.set_num_threads(1)
for case in sys.argv[2:]:
    load(folder / f"small {case.split()[0]}")  # everything is imported
for case in sys.argv[2:]:
    if (child := os.fork()):
        assert os.waitpid(child, 0)[1] == 0
        continue
    format, dtype = case.split()
    load(folder / f"small {format}")  # its pages are this process's own
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = memory("VmRSS:")
    model = load(folder / format, dtype=getattr(torch, dtype))
    print(memory("VmHWM:") - before, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_holds_the_model_once(tmp_path):
    """The peak of resident memory while loading, against the size of the file."""
    cases = {"kizzasi float32": 1.1, "kizzasi bfloat16": 0.7, "state_spaces float32": 1.1}
    spec = ModelSpec(384, (BlockSpec(MambaSpec()),) * 12, Tokens(2000), tie_head=True)
    small = spec.replace(d_model=16, blocks=spec.blocks[:1])
    for format in ("kizzasi", "state_spaces"):
        save(build_model(small), tmp_path / f"small {format}", format)
        save(build_model(spec), tmp_path / format, format)
    command = [sys.executable, "-c", PEAK, tmp_path, *cases]
    # glibc then gives every freed tensor back at once, as it does not for sizes it saw before.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    made = subprocess.run(command, capture_output=True, check=True, text=True, env=env)
    used = made.stdout.split()
    size = sum(p.stat().st_size for p in (tmp_path / "kizzasi").iterdir())
    assert size > 45e6
    for peak, (case, share) in zip(used, cases.items(), strict=True):
        assert 0.4 * size < int(peak) < share * size, f"{case}: {int(peak) / size:.2f} of the file"
