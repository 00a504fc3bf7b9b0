"""A loaded bundle with its items as they are now and the log of what changed; rebalanced in memory,
compacted on the disk."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.errors import ChangesError
from twotower.core.files import replacing
from twotower.core.ragged import Ragged
from twotower.index.int8 import Vectors
from twotower.index.popularity import index_items
from twotower.retrieval.bundle import Bundle, load_bundle, write_bundle
from twotower.retrieval.live.catalogue import LiveCatalogue
from twotower.retrieval.live.log import (
    ChangeLog,
    changes_path,
    decode,
    encode_delete,
    encode_upsert,
    read_changes,
    sync_folder,
    write_log,
)
from twotower.retrieval.live.snapshot import Snapshot


class Staged(NamedTuple):
    """A new version of a bundle that waits to take its place.

    Attributes:
        bundle: loaded from the folder where it waits.
        start: byte of the old log from where on changes are not in it.
    """

    bundle: Bundle
    start: int


class Live:
    """Attributes:
    bundle: what was loaded.
    corpus: its items now, with the changes in its log.
    """

    def __init__(self, bundle: Bundle, lock: threading.RLock):
        """Args:
        lock: held while anything changes.
        """
        self.bundle, self._lock = bundle, lock
        self.corpus = LiveCatalogue(bundle.index, bundle.vectors, bundle.items, bundle.counts, lock)
        self._log = self._replayed(bundle.folder) if bundle.folder else None

    def upsert(self, rows: pa.Table, vectors: np.ndarray) -> None:
        """See `Retriever.upsert`."""
        log = self._writable()
        if not len(rows):
            return
        items, vectors = self.corpus.check(rows, vectors)
        with self._lock:
            log.append(encode_upsert(items, vectors))
            self.corpus.upsert(items, vectors)

    def delete(self, ids: Sequence[str]) -> int:
        """See `Retriever.delete`."""
        log = self._writable()
        with self._lock:
            snapshot, numbers = self.corpus.snapshot, self.corpus.numbers
            known = [
                item
                for item in dict.fromkeys(ids)
                if item in numbers and snapshot.place_of(numbers[item]) >= 0
            ]
            if known:
                log.append(encode_delete(known))
                self.corpus.delete(known)
            return len(known)

    def rebalance(self) -> None:
        """See `Retriever.rebalance`."""
        self.corpus.rebalance(self._index)

    def staged(self) -> Staged:
        """Writes a new version of the bundle with the changes so far beside the old one. Answers
        and changes go on."""
        log, folder = self._writable(), self.bundle.folder
        with self._lock:
            then, start = self.corpus.snapshot, log.end
        staging = folder.with_name(f"{folder.name}.staging")
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir()
        manifest = self.bundle.manifest
        kept = {name: manifest[name] for name in ("against_full",) if name in manifest}
        write_bundle(
            self._compacted(then),
            staging,
            step=manifest["step"],
            compactions=manifest.get("compactions", 0) + 1,
            **kept,
        )
        for path in staging.rglob("*"):
            _sync(path)
        return Staged(load_bundle(staging), start)

    def replaced(self, staged: Staged) -> Live:
        """The new version, in the place of the old one and with the changes since. The lock is held
        by the caller.

        Wherever this is killed, a bundle and the log that belongs to it are there.
        """
        folder, staging, log = self.bundle.folder, staged.bundle.folder, self._writable()
        sha256 = staged.bundle.manifest["sha256"]
        write_log(changes_path(folder, sha256), sha256, log.tail(staged.start))
        with replacing(folder) as temporary:
            for path in list(staging.iterdir()):
                path.rename(temporary / path.name)
        sync_folder(folder.parent)
        log.close()
        log.path.unlink(missing_ok=True)
        staging.rmdir()
        return Live(dataclasses.replace(staged.bundle, folder=folder), self._lock)

    def _replayed(self, folder: Path) -> ChangeLog:
        """Makes the changes in the log of the bundle once more."""
        sha256 = self.bundle.manifest["sha256"]
        path = changes_path(folder, sha256)
        for other in sorted(folder.parent.glob(f"{folder.name}.*.changes")):
            if other != path:
                logging.warning(
                    "%s holds changes to another version of the bundle: they are not made to this one.",
                    other,
                )
        if not path.exists():
            return ChangeLog(path, sha256)
        payloads, end = read_changes(path, sha256)
        for payload in payloads:
            try:
                change = decode(payload)
                if isinstance(change, list):
                    self.corpus.delete(change)
                else:
                    self.corpus.upsert(*self.corpus.check(*change))
            except (ValueError, KeyError, AttributeError, pa.ArrowException) as error:
                raise ChangesError(
                    f"{path} holds a change that cannot be made to the bundle: {error}."
                ) from error
        logging.info("%s: %d changes; %d items.", path, len(payloads), len(self.corpus.snapshot))
        return ChangeLog(path, sha256, end)

    def _compacted(self, then: Snapshot) -> Bundle:
        numbers, vectors, items = then.alive()
        total, counts = len(self.corpus.numbers), self.corpus.counts_of(numbers)
        places = np.full(total, -1, np.int64)
        places[numbers] = np.arange(len(numbers))
        seen = places[self.bundle.seen.values] if total else np.zeros(0, np.int64)
        seen = Ragged.from_pairs(
            self.bundle.seen.rows[seen >= 0], seen[seen >= 0], num_rows=len(self.bundle.seen)
        )
        index = self._index(vectors, counts) if then.count or then.dead else then.main.index
        return dataclasses.replace(
            self.bundle,
            vectors=vectors,
            items=items,
            counts=counts,
            seen=seen,
            index=index,
            manifest={},
        )

    def _index(self, vectors: Vectors, counts: np.ndarray) -> object:
        return index_items(self.bundle.config, vectors, counts, self.bundle.user_vectors)

    def _writable(self) -> ChangeLog:
        if self._log is None:
            raise ChangesError(
                "The items of a bundle in memory cannot be changed: changes are kept beside a bundle. Export it, and load that."
            )
        return self._log


def _sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
