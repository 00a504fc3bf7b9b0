"""A loaded bundle whose items change.

The catalogue holds the items in memory; a log makes each change durable before it is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.arrays import Ragged
from twotower.core.errors import ChangesError, SupersededError
from twotower.core.files import (
    current_version,
    discard,
    exclusive,
    explain_full_disk,
    is_current,
    next_version,
    publish_version,
    sync_files,
)
from twotower.index.base import Index, RemoteSearch, ShardedIndex
from twotower.index.build import index_items
from twotower.index.vectors import Vectors
from twotower.retrieval.bundle import OF_THE_RUN, Bundle, load_bundle, write_bundle
from twotower.retrieval.live.catalogue import LiveCatalogue
from twotower.retrieval.live.log import (
    Change,
    ChangedItems,
    ChangeLog,
    Delete,
    Upsert,
    changes_path,
)
from twotower.retrieval.live.snapshot import Snapshot


class Compaction(NamedTuple):
    """A new version of a bundle that is not current yet.

    Attributes:
        bundle: The new version, loaded.
        last: Number of the last change that the new version contains.
    """

    bundle: Bundle
    last: int


class LiveBundle:
    """A bundle, and its items as they are now.

    Attributes:
        bundle: Bundle as it was loaded.
        catalogue: Its items now, with the changes in its log.
        is_detached: Whether changes are kept apart from the bundle.
    """

    def __init__(self, bundle: Bundle, lock: threading.RLock):
        """Builds the catalogue, and makes the changes in the log once more.

        Args:
            bundle: Bundle to serve; only one that was loaded from a folder can be changed.
            lock: Lock that is held while anything changes.
        """
        self.bundle = bundle
        self.catalogue = LiveCatalogue.build(
            bundle.index, bundle.vectors, bundle.items, bundle.counts, lock
        )
        self.is_detached = False
        self._lock = lock
        self._log = self._replay_log()

    def upsert(self, rows: pa.Table, vectors: np.ndarray) -> None:
        """Adds or replaces items, durably; see `Retriever.upsert`."""
        log, _ = self._require_log()
        if not len(rows):
            return
        # Checked before it is written: a log must hold nothing that cannot be made again.
        items, vectors = self.catalogue.check(rows, vectors)
        with self._lock:
            with self._transaction(log):
                log.add(Upsert(items, vectors))
            # After the commit: no answer may show a change that a power cut takes back.
            self.catalogue.upsert(items, vectors)

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, durably, and counts them; see `Retriever.delete`."""
        log, folder = self._require_log()
        with self._lock:
            self._check_version(folder)
            # No log is begun for nothing.
            if not log.path.exists() and not self._existing_ids(ids):
                return 0
            with self._transaction(log):
                # Looked up anew: the transaction begins with the changes of other processes.
                alive = self._existing_ids(ids)
                if alive:
                    log.add(Delete(tuple(alive)))
            return self.catalogue.delete(alive)

    def detach(self, path: Path) -> None:
        """Keeps changes in another file from now on; see `Retriever.detach`."""
        with self._lock:
            log, _ = self._require_log()
            if not self.is_detached:
                log.close()
                self._log = ChangeLog(path, self.bundle.manifest["sha256"])
                self.is_detached = True

    def follow(self) -> int:
        """Makes the changes of other processes, and counts them; see `Retriever.follow`."""
        if self._log is None:
            return 0
        changes = self._log.read()
        self._apply(changes, self._log)
        return len(changes)

    def rebalance(self) -> None:
        """Indexes the present items anew, in memory; see `Retriever.rebalance`."""
        # In memory alone: the folder stays as it is, with its changes in the log.
        self.catalogue.rebalance(self._index)

    @contextlib.contextmanager
    def make_versions(self) -> Iterator[None]:
        """Excludes other processes that make versions of the bundle: exports and compactions.

        Raises:
            BusyError: Another one makes a version now.
            ChangesError: Another one has made a version since this was loaded.
        """
        log, folder = self._require_log()
        stays = f"The bundle stays as it was, with its changes in {log.path}."
        with explain_full_disk(folder, stays), exclusive(folder, "compact"):
            self._check_version(folder)
            yield

    def compact(self) -> Compaction:
        """Writes the next version of the bundle, with the changes so far.

        Answers and changes go on meanwhile, and the old version stays current. The caller excludes
        others by `make_versions`.
        """
        # Not for those who only answer.
        from twotower.retrieval import golden

        log, folder = self._require_log()
        # Both of one moment: what comes after `last` is copied when the versions are switched.
        with self._lock:
            then = self.catalogue.snapshot
            last = log.last
        manifest = self.bundle.manifest
        # An export carries them over: it must know them when there is no log any more.
        earlier = ChangedItems.from_manifest(manifest)
        changed = earlier.after(log.since(0)[:last])
        # Of the run, which the bundle does not hold.
        kept = {name: manifest[name] for name in OF_THE_RUN if name in manifest}
        with next_version(folder) as version:
            bundle = self._replace_items(then)
            write_bundle(
                bundle,
                version,
                step=manifest["step"],
                golden=golden.make(bundle),
                compactions=manifest.get("compactions", 0) + 1,
                changed_items=dataclasses.asdict(changed),
                **kept,
            )
            # The long wait for the disk is here, not where the lock is held.
            sync_files(version)
            return Compaction(load_bundle(version), last)

    def switch_to(self, compaction: Compaction) -> LiveBundle:
        """Makes the new version current, with the changes since. The caller holds the lock.

        Killed at any moment, this leaves a current version with its own log: the log of the new one
        is written before the new one is current, and that of the old one is deleted after.
        """
        log, folder = self._require_log()
        new = compaction.bundle
        version = new.folder
        if version is None:
            raise ValueError("A compacted bundle is loaded from its folder.")
        sha256 = new.manifest["sha256"]
        new_log = ChangeLog(changes_path(version, sha256), sha256)
        try:
            # In a transaction of the old log: no other process may add to it until it is
            # superseded.
            with self._transaction(log):
                later = log.since(compaction.last)
                if later:
                    with new_log.transaction():
                        for change in later:
                            new_log.add(change)
                    new_log.close()
                publish_version(version)
        except BaseException:
            if not is_current(version):
                new_log.close()
                new_log.path.unlink(missing_ok=True)
                discard(version)
            raise
        log.close()
        log.path.unlink(missing_ok=True)
        # `new` was loaded from its version's folder, but is now found by the folder above.
        return LiveBundle(dataclasses.replace(new, folder=folder), self._lock)

    def _require_log(self) -> tuple[ChangeLog, Path]:
        """Returns the log and the folder of the bundle, where it has them."""
        if isinstance(self.bundle.index, RemoteSearch):
            raise ChangesError(
                "The items of shards in processes of their own cannot be changed: change the "
                "bundle in one process, compact it, and start the shards and routers again."
            )
        if self._log is None or self.bundle.folder is None:
            raise ChangesError(
                "The items of a bundle in memory cannot be changed: changes are kept beside a "
                "bundle. Export it, and load that."
            )
        return self._log, self.bundle.folder

    @contextlib.contextmanager
    def _transaction(self, log: ChangeLog) -> Iterator[None]:
        """A transaction of the log that begins with the changes of other processes."""
        _, folder = self._require_log()
        # Before the log is opened, too: that of a version that is gone must not be begun anew.
        self._check_version(folder)
        with log.transaction() as missed:
            self._apply(missed, log)
            self._check_version(folder)
            yield

    def _check_version(self, folder: Path) -> None:
        """Refuses a bundle that an export, or a compaction by another process, has superseded."""
        if self.is_detached:
            return
        # Read each time: another process may have switched since.
        now = current_version(folder)
        if now != self.bundle.version:
            raise SupersededError(
                f"{folder} was replaced by another version ({now.name}) since it was loaded: a "
                "change to the old one would be lost. Load the bundle again."
            )

    def _existing_ids(self, ids: Iterable[str]) -> list[str]:
        """Returns the ids, each once, whose items exist."""
        # `numbers` alone does not say so: items that were deleted keep theirs.
        snapshot = self.catalogue.snapshot
        numbers = self.catalogue.numbers
        known = [item for item in dict.fromkeys(ids) if item in numbers]
        return [item for item in known if snapshot.position_of(numbers[item]) >= 0]

    def _replay_log(self) -> ChangeLog | None:
        """Returns the log, after making the changes in it once more; None of a bundle in memory."""
        folder = self.bundle.folder
        version = self.bundle.version
        # Items in other processes are those of the export, and stay so.
        is_remote = isinstance(self.bundle.index, RemoteSearch)
        if folder is None or version is None or is_remote:
            return None
        sha256 = self.bundle.manifest["sha256"]
        log = ChangeLog(changes_path(version, sha256), sha256)
        # Logs lie beside their version; those of a bundle that is no folder of versions, beside it.
        logs = {*folder.glob("v-*.changes"), *folder.parent.glob(f"{folder.name}.*.changes")}
        for other in sorted(logs - {log.path}):
            logging.warning(
                "%s holds changes to another version of the bundle: they are not made to this one.",
                other,
            )
        # As they were made: whether an item exists depends on all changes before.
        changes = log.read()
        self._apply(changes, log)
        if changes:
            size = len(self.catalogue.snapshot)
            logging.info("%s: %d changes; %d items.", log.path, len(changes), size)
        return log

    def _apply(self, changes: Iterable[Change], log: ChangeLog) -> None:
        for change in changes:
            try:
                if isinstance(change, Delete):
                    self.catalogue.delete(change.ids)
                else:
                    self.catalogue.upsert(*self.catalogue.check(change.items, change.vectors))
            except (ValueError, KeyError, AttributeError, pa.ArrowException) as error:
                raise ChangesError(
                    f"{log.path} holds a change that cannot be made to the bundle: {error}."
                ) from error

    def _replace_items(self, then: Snapshot) -> Bundle:
        """Returns the bundle with the items of a snapshot in the place of its own."""
        numbers, vectors, items = then.all_items()
        counts = self.catalogue.counts_of(numbers)
        # Number of an item -> its new row, -1 for deleted ones.
        rows = np.full(len(self.catalogue.numbers), -1, np.int64)
        rows[numbers] = np.arange(len(numbers))
        # Items that users have seen are rows of the bundle, which change; deleted ones are dropped.
        seen = self.bundle.seen
        seen_rows = np.zeros(0, np.int64)
        if len(rows):
            seen_rows = rows[seen.values]
        is_left = seen_rows >= 0
        events = self.bundle.seen_events
        if events is not None:
            events = events.filter(pa.array(is_left))
        # Without changes the index is right as it is, and building it would take minutes.
        index = then.base.index
        if then.num_slots or then.num_removed:
            index = self._index(vectors, items, counts)
        return dataclasses.replace(
            self.bundle,
            vectors=vectors,
            items=items,
            counts=counts,
            seen=Ragged.from_pairs(seen.rows[is_left], seen_rows[is_left], num_rows=len(seen)),
            seen_events=events,
            index=index,
            manifest={},
        )

    def _index(self, vectors: Vectors, items: pa.Table, counts: np.ndarray) -> Index:
        bundle = self.bundle
        shards = ()
        # New items go to the shard of their hash.
        if isinstance(bundle.index, ShardedIndex):
            from twotower.retrieval.shards.assign import rows_of_shards

            shards = rows_of_shards(items["item_id"], len(bundle.index.parts))
        # Tuned on the users of the export: vectors of others are not kept.
        return index_items(
            bundle.config, vectors, counts, bundle.user_vectors, bundle.index, shards
        )
