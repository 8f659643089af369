"""The winner out: a folder that works without the run, and the run for other tools."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_runs import HOSTILE, complete_events, evolved_events

from kizzasi.cli import main
from kizzasi.errors import StudyError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.nas.report.export import SCRIPT, export
from kizzasi.nas.report.other_tools import genotype, to_optuna, to_tensorboard
from kizzasi.nas.study.journal import Journal, read_events

SPEC = ModelSpec(
    16,
    (BlockSpec(MambaSpec()), BlockSpec(AttentionSpec(n_heads=2), SwiGLUSpec(24))),
    Tokens(256),
)
FILES = ["README.md", "config.json", "generate.py", "lineage.json", "model.safetensors"]
FILES += ["spec.json", "spec.yaml"]


def write_run(folder, events):
    with Journal(folder / "journal.jsonl") as journal:
        for event in events:
            journal.append(event)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A made-up journal whose winner is a small model that is really there."""
    folder = tmp_path_factory.mktemp("runs")
    events = complete_events(name=HOSTILE.replace("\udcff", ""))
    won = events[-1]["winner"]
    events = [{**e, "spec": SPEC.to_dict()} if e.get("id") == won else e for e in events]
    build_model(SPEC, seed=3).save_pretrained(folder / "best")
    return write_run(folder, events)


@pytest.fixture(scope="module")
def out(run, tmp_path_factory) -> Path:
    return export(run, tmp_path_factory.mktemp("models") / "mine")


def test_the_export_is_the_winner(run, out):
    assert sorted(path.name for path in out.iterdir()) == FILES
    ids = torch.tensor([[108, 105, 110, 101]])
    with torch.no_grad():
        assert torch.equal(load(out)(ids).logits, load(run / "best")(ids).logits)
    for name in ("spec.yaml", "spec.json"):
        assert ModelSpec.from_file(out / name) == SPEC
    assert [node["winner"] for node in json.loads((out / "lineage.json").read_text())].count(True)


def test_the_card_says_how_it_was_made_and_measured(out):
    card = (out / "README.md").read_text("utf-8")
    for said in (
        "sha256 `" + "ab" * 32,
        "262,144 tokens from scratch, lr 0.006",
        "seeds 0, 1, 2; the weights are those of seed 0",
        "2.320 ± 0.020",
        "Noise floor: 0.010 (95 %, paired over 3 seeds)",
        "| xz | 2.600 |",
        "| layer 2 | attention: n\\_heads 2",
        "No candidate descends from another.",
        SPEC.digest,
        "kizzasi train . --tokens",
        "## License\n\nNot stated.",
    ):
        assert said in card
    assert "<script" not in card


def test_the_script_runs_by_itself(out):
    assert len(SCRIPT.splitlines()) == 15
    command = [sys.executable, "-W", "error", str(out / "generate.py"), "line "]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True, cwd="/")
    assert done.stdout.startswith(b"line ")
    assert len(done.stdout.decode()) > 50


def test_it_trains_on_by_tokens(run, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"the quick brown fox\n" * 300)
    command = ["train", run / "best", "--tokens", 2000, "--data", tmp_path / "text", "--json"]
    command += ["--seq-len", 32, "--batch-size", 4, "--out", tmp_path / "longer"]
    assert main([str(c) for c in command]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["recipe"]["horizon"] == 2000
    assert load(tmp_path / "longer").spec == SPEC


def test_a_run_without_a_study_or_a_name_of_its_data_is_exported_too(run, tmp_path):
    begun, *rest = read_events(run / "journal.jsonl")
    for name, events in (("none", rest), ("empty", [{**begun, "data": {}}, *rest])):
        shutil.copytree(run, tmp_path / name)
        (tmp_path / name / "journal.jsonl").unlink()
        write_run(tmp_path / name, events)
        card = export(tmp_path / name, tmp_path / f"{name} out") / "README.md"
        assert "- without a name\n" in card.read_text("utf-8")


def test_the_verb(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == FILES
    assert main(["export", str(run), "--out", str(tmp_path / "a")]) == 0  # once more, in place
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "give the folder of a run" in capsys.readouterr().err


def test_what_cannot_be_exported(run, tmp_path):
    half = write_run(tmp_path / "half", complete_events()[:-1])
    with pytest.raises(StudyError, match="no winner yet; finish the search with --resume"):
        export(half, tmp_path / "out")
    other = shutil.copytree(run, tmp_path / "other")
    build_model(SPEC.replace(d_model=24)).save_pretrained(other / "best", overwrite=True)
    with pytest.raises(StudyError, match="not the architecture that the journal calls the best"):
        export(other, tmp_path / "out")
    for own in (run, run / "best"):
        with pytest.raises(StudyError, match="holds the run's own files"):
            export(run, own)
    assert not (tmp_path / "out").exists()


def test_genes_by_their_paths():
    given = {"genotype": {"a": [1, {"b": None, "c": True}], "d": "x"}}
    assert genotype(given) == {"a.0": 1, "a.1.c": "True", "d": "x"}
    assert genotype({"genotype": 3}) == {"gene": 3}
    read = genotype({"family": "mamba", "spec": SPEC.to_dict()})
    assert {"family": "mamba", "d_model": 16, "n_layers": 2, "mixer.d_state": 16}.items() <= (
        read.items()
    )


@pytest.mark.parametrize("events", [complete_events(failures=True), evolved_events(), []])
def test_a_study_for_optuna(tmp_path, events):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = to_optuna(write_run(tmp_path, events))
    candidates = [e for e in events if e["event"] == "candidate"]
    assert [t.user_attrs["id"] for t in study.trials] == [e["id"] for e in candidates]
    if not events:
        return
    assert study.user_attrs["data"]["name"] == "topics"
    states = [t.state.name for t in study.trials]
    assert states.count("FAIL") == 1
    scored = [e for e in events if e["event"] == "trial" and e["score"] is not None]
    climbed = {e["rung"] for e in scored} - {"final"}
    deepest = [e for e in scored if e["rung"] == max(climbed)]
    assert states.count("COMPLETE") == len(deepest)
    assert study.best_value == min(e["score"] for e in deepest)
    assert all(t.intermediate_values for t in study.trials if t.state.name == "PRUNED")
    won = next(t for t in study.trials if t.user_attrs["id"] == events[-1]["winner"])
    assert won.user_attrs["final"] == pytest.approx({"0": 2.3, "1": 2.32, "2": 2.34})


def test_event_files_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = write_run(tmp_path / "run", complete_events()[:-1])
    board = to_tensorboard(run, tmp_path / "board")
    (winners,) = board.glob("000000000002-lr0.006-seed0-1")
    seen = EventAccumulator(str(winners)).Reload()
    curve = seen.Scalars("training loss")
    assert [point.step for point in curve] == list(range(10_240, 98_305, 10_240))
    assert [point.step for point in seen.Scalars("held-out bits/byte")] == [32_768, 98_304]
    assert "_hparams_/experiment" in str(seen.Tags()) or "_hparams_" in str(seen.summary_metadata)
    with pytest.raises(StudyError, match="holds files already"):
        to_tensorboard(run, board)


def test_no_id_of_a_journal_leads_out_of_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    events = complete_events()
    own = next(e["id"] for e in events if e["event"] == "candidate")
    run = write_run(
        tmp_path / "run", json.loads(json.dumps(events).replace(f'"{own}', '"../../out'))
    )
    board = to_tensorboard(run, tmp_path / "deep" / "board")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "run"]
    assert list((tmp_path / "deep").iterdir()) == [board]
    assert any(p.name.startswith(".._.._out-lr") for p in board.iterdir())


@pytest.mark.parametrize(
    ("module", "convert"),
    [("optuna", to_optuna), ("tensorboard", lambda run: to_tensorboard(run, run / "board"))],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, convert):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    run = write_run(tmp_path, [])
    with pytest.raises(StudyError, match=rf"pip install 'kizzasi-models\[{module}\]'"):
        convert(run)
