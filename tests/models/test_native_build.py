"""Building the kernels: what a library is named after, and that an install survives without one."""

import shutil
import subprocess
import sys

import pytest

from kizzasi.models.ops.native import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler here")


@pytest.fixture
def folder(tmp_path):
    """A copy of the builder with a kernel that compiles at once."""
    shutil.copy(build.HERE / "build.py", tmp_path)
    shutil.copy(build.HERE / "threads.c", tmp_path)
    return tmp_path


@needs_compiler
def test_a_library_older_than_its_sources_is_absent(folder):
    first = build.build(folder)
    assert first == build.library_path(folder) == build.build(folder)
    with open(folder / "threads.c", "a") as file:
        file.write("// changed\n")
    assert not build.library_path(folder).exists()
    second = build.build(folder)
    assert [*folder.glob("kernels-*")] == [second]
    assert second != first


def test_without_a_compiler_an_install_goes_on(folder, monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda wanted: None)
    with pytest.raises(FileNotFoundError, match="no C compiler"):
        build.build(folder)
    assert "not built, torch does without: no C compiler" in build.attempt(folder)
    assert not [*folder.glob("kernels-*")]


@needs_compiler
def test_a_compiler_that_fails_is_heard_and_leaves_nothing(folder):
    (folder / "broken.c").write_text("int f(void) { return missing; }")
    assert "missing" in build.attempt(folder)
    assert not [*folder.glob("kernels-*")]


def test_the_builder_needs_only_python():
    code = (
        f"import runpy; print(runpy.run_path({str(build.HERE / 'build.py')!r})['library_path']())"
    )
    command = [sys.executable, "-S", "-E", "-c", code]
    assert subprocess.check_output(command, text=True).strip() == str(build.library_path())
