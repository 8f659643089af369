"""Trials on Ray: the results of one process, also when a node is killed on the way."""

import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from small_search import SPACE, config, outcome, write_text
from tqdm import tqdm

from kizzasi.errors import StudyError
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.executors import InProcess, Limits
from kizzasi.nas.executors.ray import PROBE, Ray, _Place
from kizzasi.nas.search import named_search
from kizzasi.nas.spaces.families import model_spec
from kizzasi.train.bytes import load_corpus
from kizzasi.train.recipe import Recipe

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SMALL = {"include_dashboard": False, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def quiet_ray(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine starves the workers


@contextmanager
def local():
    ray.init(num_cpus=2, log_to_driver=False, **SMALL)
    try:
        yield
    finally:
        ray.shutdown()


def jobs(folder: Path, n: int, tokens: int = 512) -> list[Job]:
    spec = model_spec(
        "transformer",
        d_model=16,
        d_state=8,
        n_layers=1,
        expand_factor=1.0,
        dropout=0.0,
        vocab_size=256,
    )
    folder.mkdir()
    return [
        Job(spec, tokens, seed, {"lr": 1e-3}, tokens, folder / f"{seed}.pt", key=str(seed))
        for seed in range(n)
    ]


def evaluator(data: str) -> MicroTrain:
    return MicroTrain(load_corpus(data), Recipe(512, seq_len=32, batch_size=4))


def scores(executor, tasks: list[Job]) -> dict[str, tuple]:
    with executor, tqdm(disable=True) as bar:
        results = [(job.key, m.score, m.curve) for job, m in executor.run(tasks, bar)]
    assert len(results) == len(tasks)
    return {key: rest for key, *rest in results}


def test_a_search_on_ray_is_the_search_in_one_process(data, tmp_path):
    named_search(config(data), tmp_path / "here", SPACE)
    with local():
        named_search(config(data), tmp_path / "there", SPACE, workers=2, executor="ray")
        assert ray.is_initialized(), "a connection that the caller made was closed"
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")
    assert list((tmp_path / "there" / "trials").iterdir()) == [], "the probe was left behind"


def test_a_worker_killed_during_a_search_changes_nothing(data, tmp_path, monkeypatch):
    named_search(config(data), tmp_path / "here", SPACE)
    received, lost, killed = Ray._received, Ray._lost, list[int]()
    jobs_lost = []

    def then_killed(self, answer, bar):
        if len(killed) < 3 and answer[1] is not None:
            killed.append(own_actors()[0])
            os.kill(killed[-1], signal.SIGKILL)
        return received(self, answer, bar)

    monkeypatch.setattr(Ray, "_received", then_killed)
    monkeypatch.setattr(Ray, "_lost", lambda *args: jobs_lost.append(args[1]) or lost(*args))
    with local():
        named_search(config(data), tmp_path / "there", SPACE, workers=2, executor="ray")
    assert (len(killed), len(jobs_lost)) == (3, 3)
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")
    assert list((tmp_path / "there" / "trials").iterdir()) == []


def test_a_node_killed_during_a_search_changes_nothing(data, tmp_path, monkeypatch):
    named_search(config(data), tmp_path / "here", SPACE)
    received, lost, jobs_lost, results = Ray._received, Ray._lost, [], []
    with two_nodes() as kill_second:

        def then_killed(self, answer, bar):
            if answer[1] is not None:
                results.append(answer)
                if len(results) == 4:
                    assert self.n_workers == 2
                    kill_second()
            return received(self, answer, bar)

        monkeypatch.setattr(Ray, "_received", then_killed)
        monkeypatch.setattr(Ray, "_lost", lambda *a: jobs_lost.append(a[1]) or lost(*a))
        named_search(config(data), tmp_path / "there", SPACE, workers=2, executor="ray")
    assert [job for job in jobs_lost if job is not None], "the second node had no work"
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")
    assert list((tmp_path / "there" / "trials").iterdir()) == []


@contextmanager
def two_nodes():
    """A cluster of two nodes of one CPU each, and what kills the second."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **SMALL})
    second = cluster.add_node(num_cpus=1, object_store_memory=SMALL["object_store_memory"])
    try:
        ray.init(cluster.address, log_to_driver=False)
        yield lambda: cluster.remove_node(second, allow_graceful=False)
    finally:
        ray.shutdown()
        cluster.shutdown()


def own_actors() -> list[int]:
    """Processes of actors among the descendants of this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = []
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if above == os.getpid() and command.startswith(b"ray::_Place"):
                found.append(pid)
    return found


def test_a_trial_that_explodes_is_not_a_lost_node(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = Ray(evaluator(data), n_workers=1, limits=Limits(memory_bytes=1))
    tasks = jobs(Path("trials"), 2)
    with broken, tqdm(disable=True) as bar:
        failures = [m.failure for _, m in broken.run(tasks, bar)]
    assert len(failures) == 2
    assert all("Traceback" in failure for failure in failures)
    assert not ray.is_initialized(), "the cluster that we started outlives us"


def test_a_node_killed_on_the_way_loses_nothing(data, tmp_path, monkeypatch):
    expected = scores(InProcess(evaluator(data)), jobs(tmp_path / "here", 12, 16_384))
    real, lost, found = Ray._lost, [], {}
    monkeypatch.setattr(Ray, "_lost", lambda *args: lost.append(args[1]) or real(*args))
    with two_nodes() as kill_second, Ray(evaluator(data)) as executor, tqdm(disable=True) as bar:
        assert executor.n_workers == 2
        for job, m in executor.run(jobs(tmp_path / "there", 12, 16_384), bar):
            found[job.key] = [m.score, m.curve]
            if len(found) == 4:
                kill_second()
    assert len([job for job in lost if job is not None]) == 1
    assert found == expected


def test_a_folder_that_a_node_does_not_see_is_named(data, tmp_path):
    place = _Place(evaluator(data), 1, Limits())
    (tmp_path / PROBE).write_text("another word")
    with local():
        answer = place.ready({tmp_path: "word"})
    assert isinstance(answer, StudyError)
    assert "does not see this folder; put --out on a file system that all nodes share" in str(
        answer
    )
    assert place.ready({}) == (0, None)


def test_no_cluster_no_room(data):
    with pytest.raises(StudyError, match=r"--address 127.0.0.1:1: .*ray start"):
        Ray(evaluator(data), "127.0.0.1:1")
    with local(), pytest.raises(StudyError, match="has 2 CPUs and 0 GPUs; a worker needs 3 and 0"):
        Ray(evaluator(data), n_threads=3)
