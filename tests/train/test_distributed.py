"""Two processes train as one, sharded or not; a process killed by the system loses little."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, load
from kizzasi.models.channels import MoESpec, RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec
from kizzasi.train.distributed import Ranks, check_batch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch lacks distributed")


# balanced by a bias, which the processes move together
MIXTURE = MoESpec(
    **{"n_experts": 4, "hidden": 24, "balance_weight": 0.0, "z_loss_weight": 0.0},
    router=TopK(score="sigmoid", bias_rate=0.02),
)


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory):
    blocks = (
        BlockSpec(MambaSpec(d_state=4)),
        BlockSpec(AttentionSpec(n_heads=2), SwiGLUSpec(hidden=48)),
        BlockSpec(AttentionSpec(n_heads=2), MIXTURE),
        BlockSpec(RWKV7Spec(head_dim=8), RWKVChannelSpec(hidden=48)),
    )
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    ModelSpec(24, blocks, Tokens(256), tie_head=True).to_file(path)
    return path


def command(spec_file, out, *options, processes=2):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [spec_file, "--steps", 30, "--seq-len", 32, "--batch-size", 4, "--out", out]
    script = [ROOT / "scripts" / "train.py", *arguments, *options, "--json"]
    return [str(part) for part in (*start, *script)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(*args, **kwargs):
    done = subprocess.run(
        command(*args, **kwargs), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def alone(spec_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return train(spec_file, out, processes=1), load(out)


def assert_same(result, folder, alone):
    expected, model = alone
    torch.testing.assert_close(
        torch.tensor(result["curve"]), torch.tensor(expected["curve"]), rtol=1e-4, atol=0
    )
    assert result["score"] == pytest.approx(expected["score"], rel=1e-4)
    for (name, a), b in zip(
        load(folder).state_dict().items(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)
    assert model.blocks[2].channel.gate.bias.abs().max() > 0.02


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_give_the_curve_of_one(how, spec_file, alone, tmp_path):
    assert_same(train(spec_file, tmp_path, "--parallel", how), tmp_path, alone)


def test_a_killed_process_and_then_any_number_of_processes(spec_file, alone, tmp_path):
    """kill -9 of one of two sharding processes; one process alone goes on from the checkpoint."""
    options = ("--parallel", "fsdp", "--save-every", "5")
    running = subprocess.Popen(
        command(spec_file, tmp_path, *options),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = tmp_path / "training.pt"
    deadline = time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.01)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    assert running.wait(120) != 0
    assert_same(train(spec_file, tmp_path, "--resume", processes=1), tmp_path, alone)
    assert not state.exists()


def test_a_batch_must_be_shared_evenly():
    with pytest.raises(SpecError, match=r"batch_size: 6 .*multiple of 4"):
        check_batch(Ranks(0, 4), 6)
