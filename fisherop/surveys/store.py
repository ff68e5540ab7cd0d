"""A folder of cells: written whole or not at all, read back only if unchanged.

A cell is two files in ``cells/ab``, named by its key ``ab…``: a sidecar ``ab….json``, and the arrays in an ``.npz``
that is named by the key and by its own checksum. The sidecar is written last, and is what makes a cell exist. It names
its ``.npz``, so that of two processes which compute the same cell at the same time one wins, whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
DONE, FAILED = "done", "failed"

OPENING, CLOSING = '{"check": "', '",'
CHECK_LENGTH = 32
STALE_SECONDS = 24 * 3600
"""Age at which an unfinished file is taken to be of a process that died."""

Sidecar = dict[str, Any]


class Damaged(ValueError):
    """A file of the store that is not as it was written."""


class Store:
    """The cells of surveys in a folder.

    Parameters
    ----------
    path : path
        The folder; made when the first cell is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise TypeError(f"store must be the path of a folder, not {path!r}")
        self.path = Path(path)
        self.cells = self.path / "cells"
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a store is a folder, and this is a file", str(self.path))

    # ------------------------------------------------------------------------------------------------------- reading

    def sidecar(self, key: str) -> Sidecar | None:
        """Return what is known of a cell, or None; raise Damaged for a sidecar that is not as it was written."""
        return self._read(self._sidecar_path(key))

    def sidecars(self) -> Iterator[Sidecar]:
        """Yield all sidecars, but for those that are damaged; warn of how many these are."""
        damaged = 0
        with contextlib.suppress(FileNotFoundError):
            for folder in sorted(entry.path for entry in os.scandir(self.cells) if entry.is_dir()):
                for entry in os.scandir(folder):
                    if entry.name.endswith(".json"):
                        try:
                            found = self._read(entry.path)
                        except Damaged:
                            damaged += 1
                            continue
                        if found is not None:
                            yield found
        if damaged:
            warnings.warn(
                f"{damaged} of the cells of {str(self.path)!r} cannot be read, for their .json is not as it was "
                "written: run the survey again, which computes them anew",
                stacklevel=2,
            )

    def data(self, sidecar: Sidecar) -> Path:
        """Return the path of a cell's arrays, checked; raise Damaged where they are not as they were written."""
        path: Path = self._folder(sidecar["key"]) / sidecar["data"]["file"]
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except IsADirectoryError:
            raise Damaged(f"{path} is a folder, where a file was written") from None
        if found != sidecar["data"]["sha256"]:
            raise Damaged(f"{path} is not as it was written")
        return path

    def state(self, key: str) -> str | None:
        """Return DONE or FAILED for a cell that is in the store, unchanged; set aside the files of one that is not."""
        try:
            sidecar = self.sidecar(key)
            if sidecar is not None and sidecar["state"] == DONE:
                self.data(sidecar)
        except Damaged:
            self._set_aside(key)
            return None
        return None if sidecar is None else str(sidecar["state"])

    def is_done(self, key: str) -> bool:
        """Tell whether a cell was finished meanwhile, by whomever."""
        try:
            sidecar = self.sidecar(key)
        except Damaged:
            return False
        return sidecar is not None and sidecar["state"] == DONE

    # ------------------------------------------------------------------------------------------------------- writing

    def prepare(self) -> None:
        """Make the folder, find out now whether it can be written, and sweep what dead processes left unfinished."""
        with self._explained():
            self.cells.mkdir(parents=True, exist_ok=True)
            probe = self.cells / _partial("probe")
            probe.write_bytes(b"?")
            probe.unlink()
        for path in self.cells.glob("*/.*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def put(self, key: str, facts: Sidecar, data: bytes) -> None:
        """Add a finished cell; one that somebody else finished meanwhile stays as it is."""
        if self.is_done(key):
            return
        checksum = hashlib.sha256(data).hexdigest()
        name = f"{key}-{checksum[:12]}.npz"
        facts = facts | {"data": {"file": name, "sha256": checksum, "bytes": len(data)}}
        self._write(self._folder(key) / name, data)
        self._write_sidecar(key, DONE, facts)

    def put_failure(self, key: str, facts: Sidecar) -> None:
        """Record a failed cell, unless it is finished."""
        if not self.is_done(key):
            self._write_sidecar(key, FAILED, facts)

    def _write_sidecar(self, key: str, state: str, facts: Sidecar) -> None:
        body = {"format": FORMAT, "key": key, "state": state, "finished": time.time()} | facts
        text = json.dumps(body, separators=(",", ":"))[1:]  # ASCII: names of files may be no valid Unicode
        check = hashlib.sha256(text.encode()).hexdigest()[:CHECK_LENGTH]
        self._write(self._sidecar_path(key), f"{OPENING}{check}{CLOSING}{text}\n".encode())

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file under a name of its own, and rename it once it is on the disk: no reader ever sees half of it.

        The folder is not synchronized: a crash of the machine may undo the last seconds' renames, and a cell that is
        not there is computed again.
        """
        partial = path.with_name(_partial(path.name))
        with self._explained():
            path.parent.mkdir(exist_ok=True)
            try:
                with open(partial, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise

    def _set_aside(self, key: str) -> None:
        """Move the files of a cell to the folder ``damaged``, for whoever wants to know what happened to them."""
        with self._explained():
            aside = self.path / "damaged"
            aside.mkdir(exist_ok=True)
            for path in self._folder(key).glob(f"{key}*"):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    os.replace(path, aside / f"{path.name}.{uuid.uuid4().hex[:8]}")

    # --------------------------------------------------------------------------------------------------------- files

    def _folder(self, key: str) -> Path:
        return self.cells / key[:2]

    def _sidecar_path(self, key: str) -> Path:
        return self._folder(key) / f"{key}.json"

    def _read(self, path: str | Path) -> Sidecar | None:
        try:
            with open(path, "rb") as file:
                raw = file.read()
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            raise Damaged(f"{path} is a folder, where a file was written") from None
        except NotADirectoryError:
            folder = os.path.dirname(path)
            raise NotADirectoryError(
                errno.ENOTDIR, "a file is where a store has a folder: move it away", folder
            ) from None
        start = len(OPENING) + CHECK_LENGTH + len(CLOSING)
        text = raw[start:].removesuffix(b"\n")
        if hashlib.sha256(text).hexdigest()[:CHECK_LENGTH].encode() != raw[len(OPENING) : len(OPENING) + CHECK_LENGTH]:
            raise Damaged(f"{path} is not as it was written")
        found: Sidecar = json.loads(b"{" + text)
        if found["format"] > FORMAT:
            raise ValueError(f"{path} was written by a newer fisherop: update this one to read it")
        return found

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of an error of the disk that the store cannot be written, and that what is in it is safe."""
        try:
            yield
        except OSError as error:
            words = (
                f"the store cannot be written ({error.strerror or error}); what is in it is safe: make room or give "
                "leave to write, and call again"
            )
            raise OSError(error.errno or errno.EIO, words, str(self.path)) from error


def _partial(name: str) -> str:
    return f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
