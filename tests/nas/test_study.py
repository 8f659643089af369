"""A study waits for what it was asked for, and keeps what came besides."""

from types import SimpleNamespace
from typing import Any

from kizzasi.nas.study.journal import Journal
from kizzasi.nas.study.study import Study, Task


def test_results_that_came_before_or_besides_wait_for_who_asks_for_them(tmp_path, monkeypatch):
    def task(key: str) -> Task:
        job: Any = SimpleNamespace(key=key)
        return Task(job, lambda measured: {"event": "note", "of": key})

    a, b, y = (task(key) for key in "aby")
    ended = iter([(y.job, None), (b.job, None)])
    executor: Any = SimpleNamespace(collect=lambda bar: next(ended))
    started = []
    monkeypatch.setattr(Study, "start", lambda self, task: started.append(task.key))
    with Journal(tmp_path / "journal.jsonl") as journal:
        study = Study(tmp_path, journal, executor, bar=None)  # pyright: ignore[reportArgumentType]
        study.tasks |= {"b": b, "y": y}
        study.arrived += [("x", {"of": "x"}), ("a", {"of": "a"})]
        found = study.all_of([a, b])
        assert {key: event["of"] for key, event in found.items()} == {"a": "a", "b": "b"}
        assert started == ["a", "b"]
        assert [study.next()[0] for _ in range(2)] == ["x", "y"]
