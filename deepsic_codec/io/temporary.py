"""Files and folders that get their name when they are complete."""

import ctypes
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4


@contextmanager
def complete_only(path: Path, kind: Literal["file", "folder"]) -> Iterator[Path]:
    """Make a hidden file or folder beside a path; when a `with` block has ended without an error, it replaces the path.

    If the block fails, it is removed. A process that is killed leaves it; the next one that writes to the same path
    removes it. A lock, which ends with its process, tells whether it is in use.
    """
    with _made(path, kind) as temporary:
        try:
            yield temporary
            if kind == "folder" and path.exists():
                if _exchange(temporary, path):
                    _remove(temporary)
                else:
                    replaced = temporary.with_suffix(".replaced")
                    with _locked(path):
                        os.rename(path, replaced)
                        os.rename(temporary, path)
                        _remove(replaced)
            else:
                os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
    _remove_unused(path)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders take each other's names at once, so that there is never none; false where Linux cannot."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old library
        return False
    folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return bool(call(folder, os.fsencode(first), folder, os.fsencode(second), exchange) == 0)


@contextmanager
def _made(path: Path, kind: str) -> Iterator[Path]:
    """Make a file or folder of a new name, and lock it."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
        temporary.mkdir() if kind == "folder" else temporary.touch(exist_ok=False)
        with _locked(temporary):
            if temporary.exists():  # another process may have removed it before it was locked
                yield temporary
                return


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder; false if another process has done so, or if the system has no such locks."""
    file, locked = None, False
    try:
        with suppress(ImportError, OSError):
            import fcntl  # not on Windows, where what a killed process left stays

            file = os.open(path, os.O_RDONLY)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        yield locked
    finally:
        if file is not None:
            os.close(file)


def _remove_unused(path: Path) -> None:
    """Remove what processes left that were killed while they wrote to a path."""
    for suffix in ("partial", "replaced"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.????????.{suffix}"):
            with _locked(left) as unused:
                if unused:
                    _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
