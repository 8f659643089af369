"""docs/machines.md: its SLURM scripts parse, and run by bash as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_search import write_text

from kizzasi.nas import SearchConfig
from kizzasi.nas.study.config_file import write_config
from kizzasi.nas.study.journal import read_events

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "machines.md").read_text()
SCRIPTS = dict(
    re.findall(r"^`(\w+\.sbatch)`:\n\n```bash\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
)
SPACE = """
d_model: {choice: [32, 48]}
stem: {kind: tokens, vocab_size: 256}
tie_head: true
blocks: {repeat: {mixer: {kind: mamba, d_state: 8}}, low: 1, high: 2}
"""


def test_both_scripts_are_there():
    assert sorted(SCRIPTS) == ["search.sbatch", "workers.sbatch"]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_parses_and_asks_for_its_folder(name):
    environment = {"PATH": os.environ["PATH"]}
    parsed = subprocess.run(["bash", "-n"], input=SCRIPTS[name], text=True, check=False)
    assert parsed.returncode == 0
    ran = subprocess.run(
        ["bash", "-s"], input=SCRIPTS[name], text=True, capture_output=True, env=environment
    )
    assert ran.returncode != 0
    assert f"RUN=/shared/runs/notes sbatch {name}" in ran.stderr


def test_the_scripts_run_a_search(tmp_path):
    program = tmp_path / "bin" / "kizzasi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kizzasi.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "space.yaml").write_text(SPACE)
    config = SearchConfig(
        data=write_text(tmp_path),
        space=str(tmp_path / "space.yaml"),
        searcher="random",
        n_params=24_000,
        band=0.4,
        n_pool=2,
        proxies=(),
        rungs=(128, 256),
        lrs=(4e-3,),
        final_tokens=256,
        final_seeds=1,
        seq_len=32,
    )
    write_config(config, tmp_path / "search.yaml")
    here = {"RUN": str(tmp_path / "run"), "SRUN": "", "DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    started = [
        subprocess.Popen(
            ["bash", "-c", SCRIPTS[name]],
            cwd=tmp_path,
            env={**os.environ, **here, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("search.sbatch", "workers.sbatch")
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n\n".join(said)
    assert "trials ended here" in said[1]
    assert read_events(tmp_path / "run" / "journal.jsonl")[-1]["event"] == "result"
    assert (tmp_path / "run" / "best" / "config.json").exists()
