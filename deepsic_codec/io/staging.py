"""A Zarr array that is not there before it is complete, and goes on where an interrupted run stopped."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import StorePath

from deepsic_codec._compat import default_buffer_prototype, make_store_path, sync
from deepsic_codec.errors import ConfigurationError, WriteError
from deepsic_codec.stored.location import storage_options

STATE = "deepsic-export.json"
METADATA = ("zarr.json", ".zarray", ".zattrs")
SAVE = 1.0  # seconds between notes of how far it is


class Stage:
    """Where the chunks of a new array go until its metadata is written.

    On a local path that is a folder beside the target (`<target>.partial`), renamed in the end. Elsewhere it is the
    target itself: chunks alone are no array for any reader of Zarr.

    Parameters
    ----------
    target : str
        Path or URL of the array.
    made : zarr.Array
        An array like it, in memory.
    request : mapping
        What the caller does, in JSON types; only the same is continued.
    overwrite : bool
        Replace an array that is at the target.
    apart_from : str
        Another array that must not be the target, nor hold it.

    Raises
    ------
    WriteError
        If something is at the target that may not be replaced.
    ConfigurationError
        For a target in a zip file, whose members cannot be replaced.
    """

    def __init__(
        self, target: str, made: zarr.Array, request: Mapping[str, Any], overwrite: bool, apart_from: str
    ) -> None:
        if target.endswith(".zip"):
            raise ConfigurationError(f"{target}: a zip file cannot be written in parts; export to a folder, zip that")
        remote = "://" in target and not target.startswith("file://")
        self.path = None if remote else Path(target.removeprefix("file://"))
        self.target = target
        self._overwrite = overwrite
        self._check(apart_from)
        where = target if self.path is None else str(self._stage)
        self._place: StorePath = sync(make_store_path(where, mode="a", storage_options=storage_options(where, None)))
        self._metadata = {key: data for key in METADATA if (data := _get(made.store_path / key)) is not None}
        # Compared as they come back from a file: tuples as lists, numbers as JSON has them.
        self._request = json.loads(json.dumps(dict(request), default=_plain))
        self.done = self._earlier()
        metadata: Any = made.metadata
        self.array = zarr.Array(zarr.AsyncArray(metadata, self._place))
        self._saved = time.monotonic()
        if not self.done:
            self._note(0)

    def _check(self, apart_from: str) -> None:
        if self.path is not None:
            source = Path(apart_from.removeprefix("file://")).resolve()
            mine = self.path.resolve()
            overlap = mine == source or mine in source.parents or source in mine.parents
            if apart_from.startswith("file://") and overlap:
                raise WriteError(f"{self.target}: the target overlaps with the source {source}", [self.target])
            if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
                if not self.path.parent.is_dir():
                    raise WriteError(f"{self.path.parent}: there is no such folder", [self.target])
                return
            path = self.path
            is_array = self._is_array(lambda key: (path / key).read_text() if (path / key).is_file() else None)
        else:
            if apart_from.rstrip("/") == self.target.rstrip("/"):
                raise WriteError(f"{self.target}: the target is the source", [self.target])
            place = sync(make_store_path(self.target, mode="a", storage_options=storage_options(self.target, None)))
            found = {key: _get(place / key) for key in (*METADATA, ".zgroup")}
            if all(data is None for data in found.values()):
                return
            is_array = self._is_array(lambda key: None if found[key] is None else found[key].decode())  # type: ignore[union-attr]
        if not is_array:
            message = f"{self.target}: there is something that is no Zarr array; choose another target"
            raise WriteError(message, [self.target])
        if not self._overwrite:
            message = f"{self.target}: there is an array already; choose another target, or --overwrite it"
            raise WriteError(message, [self.target])

    @staticmethod
    def _is_array(read: Any) -> bool:
        if read(".zarray") is not None:
            return True
        text = read("zarr.json")
        try:
            return text is not None and json.loads(text).get("node_type") == "array"
        except (ValueError, AttributeError):
            return False

    def _earlier(self) -> int:
        """Return how far an earlier run of the same request came; whatever else is there is removed."""
        data = _get(self._place / STATE)
        try:
            state = {} if data is None else json.loads(data)
            if state.get("request") == self._request:
                return int(state["done"])
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # damaged: from the beginning
        if data is None and self.path is None and not self._overwrite:
            return 0  # nothing of ours is there
        if data is None and self.path is not None:
            if self._stage.exists() and any(self._stage.iterdir()):
                message = (
                    f"{self._stage}: needed as long as the export lasts, and there is something else; move it away"
                )
                raise WriteError(message, [str(self._stage)])
            return 0
        sync(self._place.store.delete_dir(self._place.path))
        return 0

    def save(self, done: int) -> None:
        """Note how far it is, now and then."""
        if time.monotonic() - self._saved >= SAVE:
            self._note(done)
            self._saved = time.monotonic()

    def _note(self, done: int) -> None:
        _set(self._place / STATE, json.dumps({"request": self._request, "done": done}).encode())

    def finish(self) -> None:
        """Make the array one: metadata, and on a local path its name."""
        for key, data in self._metadata.items():
            _set(self._place / key, data)
        if self.path is None:
            sync((self._place / STATE).delete())
            return
        if self.path.exists():
            old = self.path.with_name(f".{self.path.name}.replaced-{os.getpid()}")
            os.rename(self.path, old)
            os.rename(self._stage, self.path)
            shutil.rmtree(old)
        else:
            os.rename(self._stage, self.path)
        # Last of all: without this note nobody knows what the stage is.
        (self.path / STATE).unlink()

    @property
    def _stage(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.partial")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _get(place: StorePath) -> bytes | None:
    data = sync(place.get(default_buffer_prototype()))
    return None if data is None else data.to_bytes()


def _set(place: StorePath, data: bytes) -> None:
    sync(place.set(default_buffer_prototype().buffer.from_bytes(data)))
