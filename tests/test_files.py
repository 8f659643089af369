"""Files appear whole or not at all, with the permissions of the umask, and follow no link."""

import os

import pytest

from kizzasi.files import write_file, write_files, write_text


@pytest.fixture
def masked():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_permissions_are_those_of_the_umask(tmp_path, masked):
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a").read_text() == "text"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "link").read_text() == "new"


def fails(file):
    file.write(b"half")
    raise OSError("disk full")


def test_a_failure_changes_nothing(tmp_path):
    write_text(tmp_path / "a", "old")
    makers = {tmp_path / "a": lambda file: file.write(b"new"), tmp_path / "b": fails}
    with pytest.raises(OSError, match="disk full"):
        write_files(makers, stale=[tmp_path / "a"])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_check_sees_the_whole_file_before_it_counts(tmp_path):
    write_text(tmp_path / "a", "old")

    def check(path):
        assert path.read_text() == "new"
        assert (tmp_path / "a").read_text() == "old"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_file(tmp_path / "a", lambda file: file.write(b"new"), check)
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_earlier_files_of_a_set_go(tmp_path):
    for name in ("a", "b", "c"):
        write_text(tmp_path / name, "old")
    write_files(
        {tmp_path / "a": lambda file: file.write(b"new")}, stale=[tmp_path / "a", tmp_path / "b"]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]
    assert (tmp_path / "a").read_text() == "new"
