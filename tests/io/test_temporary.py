import sys

import pytest

from deepsic_codec.io import temporary
from deepsic_codec.io.temporary import complete_only
from tests.common import run_python

pytest.importorskip("fcntl")


def write(path, kind, text):
    with complete_only(path, kind) as part:
        (part if kind == "file" else part / "a").write_text(text)
        yield part


def content(path):
    return path.read_text() if path.is_file() else (path / "a").read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path, kind):
    path = tmp_path / "copy[1].tif"
    for name in (path, tmp_path / "copy1.tif"):
        run_python(f"""
            import os
            from pathlib import Path
            from deepsic_codec.io.temporary import complete_only
            with complete_only(Path({str(name)!r}), {kind!r}):
                os._exit(0)
        """)
    neighbour, left = sorted(tmp_path.iterdir(), key=lambda one: "[" in one.name)
    slow = write(path, kind, "slow")
    unfinished = next(slow)
    assert [*write(path, kind, "fast")] and content(path) == "fast"
    assert {*tmp_path.iterdir()} == {path, unfinished, neighbour} and left != unfinished
    assert next(slow, None) is None and content(path) == "slow"
    assert {*tmp_path.iterdir()} == {path, neighbour}


def test_a_process_that_is_killed_between_two_renames_leaves_nothing_in_the_way(tmp_path):
    path = tmp_path / "copy.zarr"
    assert [*write(path, "folder", "old")]
    run_python(f"""
        import os
        from pathlib import Path
        from deepsic_codec.io import temporary
        temporary._exchange = lambda *names: False
        rename, os.rename = os.rename, lambda *names: rename(*names) or os._exit(0)
        with temporary.complete_only(Path({str(path)!r}), "folder"):
            pass
    """)
    assert not path.exists() and len([*tmp_path.iterdir()]) == 2
    assert [*write(path, "folder", "new")] and content(path) == "new"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_left_or_replaced_after_an_error(tmp_path, kind):
    path = tmp_path / "copy"
    assert [*write(path, kind, "old")]
    writer = write(path, kind, "new")
    next(writer)
    with pytest.raises(OSError, match="full"):
        writer.throw(OSError("full"))
    assert content(path) == "old" and [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems replace a folder in two steps")
def test_a_folder_is_replaced_at_once(tmp_path, monkeypatch):
    """A process that is killed between two steps would leave none."""
    path = tmp_path / "copy"
    path.mkdir()
    monkeypatch.setattr(temporary.os, "rename", lambda *names: pytest.fail("two steps"))
    with complete_only(path, "folder") as part:
        (part / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["copy", "new"]


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    path = tmp_path / "copy"
    path.mkdir()
    (path / "old").touch()
    monkeypatch.setattr(temporary.ctypes, "CDLL", lambda name: object())
    with complete_only(path, "folder") as part:
        (part / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["copy", "new"]
