"""The changes of a bundle that an export replaces, made to the new one.

A change was acknowledged: the next export must not undo it. It is written into the log of the new
version before that becomes the current one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.errors import ChangesError, FolderError
from twotower.core.files import current_version, publish_version, read_json
from twotower.retrieval.bundle import Bundle, load_bundle
from twotower.retrieval.live.live_bundle import LiveBundle
from twotower.retrieval.live.log import ChangedItems, ChangeLog, Delete, Upsert, changes_path

ITEMS_PER_CHANGE = 20_000  # items of one change, which has a largest size


def publish_with_changes(folder: Path, version: Path, *, keep: bool = True) -> None:
    """Makes a new export the current version of a bundle, with the changes to the one before.

    Nobody can change the bundle meanwhile.

    Args:
        folder: Folder of the bundle.
        version: Finished version, inside it.
        keep: Whether changes are carried over; else they are forgotten.

    Raises:
        ChangesError: A change cannot be made to the new version.
    """
    old = _Old.find(folder)
    if old is None:
        publish_version(version)
        return
    # The lock of the old log: a change that is acknowledged meanwhile would be lost.
    with old.log.transaction() as changes:
        # With those that compactions have put into the version: the export knows nothing of them
        # either.
        changed = old.changed.after(changes)
        with contextlib.ExitStack() as stack:
            if changed and keep:
                stack.enter_context(_carried(folder, version, changed))
            publish_version(version)
    old.log.close()
    # The new version is current: whatever is left of the old one does no harm.
    with contextlib.suppress(OSError):
        old.log.path.unlink(missing_ok=True)
    if changed and not keep:
        logging.warning("%s: %s are forgotten.", folder, changed)


class _Old:
    """The version that is current before an export.

    Attributes:
        log: Log of the changes to it.
        changed: Items that were changed between the last export and that version.
    """

    def __init__(self, log: ChangeLog, changed: ChangedItems):
        self.log = log
        self.changed = changed

    @classmethod
    def find(cls, folder: Path) -> _Old | None:
        """Returns the current version of a bundle; None where there is none, or a damaged one
        without changes."""
        try:
            version = current_version(folder)
            manifest = read_json(version / "manifest.json")
            sha256 = str(manifest["sha256"])
            changed = ChangedItems.from_manifest(manifest)
        # A damaged bundle is what an export replaces; only its changes would be lost with it.
        except (FolderError, OSError, KeyError, TypeError) as error:
            logs = sorted(folder.glob("v-*.changes"))
            if not logs:
                return None
            raise ChangesError(
                f"{folder} is damaged ({error}), so that the changes in {logs[-1].name} cannot be "
                "carried over. Restore it, or move that file away to export without them."
            ) from error
        return cls(ChangeLog(changes_path(version, sha256), sha256), changed)


@contextlib.contextmanager
def _carried(folder: Path, version: Path, changed: ChangedItems) -> Iterator[None]:
    """Writes the changes into the log of the new version; takes them away if the block fails."""
    new = load_bundle(version)
    rows, vectors = _changed_rows(folder, new, changed.upserted)
    catalogue = LiveBundle(new, threading.RLock()).catalogue
    # As it would be made by a loaded bundle: a log must hold nothing that cannot be made again.
    items, vectors = catalogue.check(rows, vectors)
    # An item that the new corpus does not have needs no deletion.
    deleted = [item for item in changed.deleted if item in catalogue.numbers]
    sha256 = new.manifest["sha256"]
    log = ChangeLog(changes_path(version, sha256), sha256)
    try:
        with log.transaction():
            # Deletions first: an id stands in one of both, by its latest change.
            if deleted:
                log.add(Delete(tuple(deleted)))
            for start in range(0, len(items), ITEMS_PER_CHANGE):
                stop = start + ITEMS_PER_CHANGE
                log.add(Upsert(items.slice(start, ITEMS_PER_CHANGE), vectors[start:stop]))
        log.close()
        # The new version becomes current in the block; until then its log belongs to nothing.
        yield
    except BaseException:
        log.close()
        log.path.unlink(missing_ok=True)
        raise
    logging.info("%s: %s are carried over.", folder, changed)


def _changed_rows(folder: Path, new: Bundle, ids: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """Returns the rows of items as they are in the current version, and their vectors by the new
    towers.

    Raises:
        ChangesError: The rows lack a column that the item tower reads.
    """
    old = LiveBundle(load_bundle(folder), threading.RLock())
    catalogue = old.catalogue
    snapshot = catalogue.snapshot
    positions = [snapshot.position_of(catalogue.numbers[item]) for item in ids]
    alive = np.array([position for position in positions if position >= 0], np.int64)
    rows = pa.Table.from_pylist(snapshot.rows(alive), schema=catalogue.schema)
    vectors = snapshot.vectors(alive)
    # By the same towers they stay as they are, also those that came with the change itself.
    is_same = old.bundle.manifest["model_version"] == new.manifest["model_version"]
    if not len(alive) or (is_same and vectors.shape[1] == new.towers.dim):
        return rows, vectors.reshape(len(alive), new.towers.dim)
    needed: list[str] = []
    for feature in new.encoder.spec.item.values():
        needed += feature.columns_read
    missing = [column for column in dict.fromkeys(needed) if column not in rows.column_names]
    if missing:
        raise ChangesError(
            f"{folder} has changes that this export cannot carry over: the item tower reads "
            f"{', '.join(missing)}, which the changed items (such as {ids[0]!r}) are not stored "
            "with. Export with --changes=drop, which forgets them, and make them again; or name "
            "those columns in config.retrieval.display."
        )
    return rows, new.towers.embed("item", new.encoder.encode("item", rows))
