"""The items that were shown, as Parquet files in a folder: what training and estimates learn from.

A request leaves its answer in memory; a thread makes rows of it, and a file of the rows once a
minute. What was not written yet is lost when the process is killed. The folder has a bounded size,
for which the oldest files make room. Several processes may share it.
"""

from __future__ import annotations

import collections
import datetime
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.arrow import pc
from twotower.core.errors import ChangesError, ConfigError
from twotower.core.files import atomic

if TYPE_CHECKING:  # reading the files needs no extra
    from twotower.serving.types import Answer

SCHEMA = pa.schema(
    {
        "recommendation_id": pa.string(),
        "time": pa.timestamp("us", "UTC"),
        "user_id": pa.string(),
        "item_id": pa.string(),
        "position": pa.int32(),  # from 1, those that an offset left out included
        "score": pa.float32(),
        "source": pa.dictionary(pa.int32(), pa.string()),
        "propensity": pa.float64(),
        "best": pa.bool_(),  # whether the item would be there without exploration
        "model_version": pa.dictionary(pa.int32(), pa.string()),
    }
)
MAX_WAITING = 20_000  # answers in memory; of more, the latest are lost
MAX_ROWS = 200_000  # rows of a file
LOOK_SECONDS = 0.5  # between two looks at what was answered
PATTERN = "impressions-*.parquet"


class _Shown(NamedTuple):
    """An answer, and what its request said."""

    time: float
    user: Any
    read_user: Callable[[Any], str | None]
    offset: int
    answer: Answer


class ImpressionLog:
    """The writer of the impressions of one process.

    Attributes:
        folder: Folder of the files.
        lost: Number of answers that were not written: the disk refused, or was too slow.
    """

    def __init__(self, folder: Path | str, *, seconds: float = 60.0, megabytes: int = 10_000):
        """Begins to write.

        Args:
            folder: Folder of the files; made where it is missing.
            seconds: Time after which a file is written.
            megabytes: Size of the folder, beyond which the oldest files are deleted.

        Raises:
            ConfigError: The folder cannot be written to.
        """
        self.folder = Path(folder)
        self.lost = 0
        self._seconds = seconds
        self._bytes = megabytes << 20
        self._shown: collections.deque[_Shown] = collections.deque()
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._since = time.monotonic()
        self._is_closed = threading.Event()
        # For the rows, which the thread makes and an erasure looks through.
        self._lock = threading.Lock()
        self._erasing = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Found at the start: the thread that writes could only count what is lost.
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise ConfigError(
                f"--impressions={folder} cannot be written to: {error.strerror}. Name a folder of "
                "your own."
            ) from None
        # A daemon, so that an error of the server's start does not wait for it.
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def add(
        self, user: Any, read_user: Callable[[Any], str | None], offset: int, answer: Answer
    ) -> None:
        """Keeps an answer until it is written.

        Args:
            user: Id of the user as it was sent; None without one.
            read_user: Function that returns an id in the form of the log.
            offset: Number of items before the first one.
            answer: Answer, which nobody changes from now on.
        """
        # The latest are left out, not the oldest: nobody but the thread takes from the other end.
        if len(self._shown) >= MAX_WAITING:
            self.lost += 1
            return
        # Without a lock: appending and taking are single steps of CPython, each at one end.
        self._shown.append(_Shown(time.time(), user, read_user, offset, answer))

    def flush(self) -> None:
        """Writes what is there."""
        with self._lock:
            self._take()
            self._write()

    def erase(self, user_id: str) -> int:
        """Deletes the rows of a user from all files of the folder, and returns their number.

        Args:
            user_id: Id of the user, in the form of the log.

        Raises:
            ChangesError: Some files cannot be read; all others have nothing of the user any more.
        """
        self.flush()
        count = 0
        damaged = []
        # One after another: of two that write a file anew, the later one would bring the rows of
        # the other's user back.
        with self._erasing:
            for path in sorted(self.folder.glob(PATTERN)):
                # Another process may make room meanwhile.
                try:
                    count += _erase(path, user_id)
                except FileNotFoundError:
                    continue
                # It must not keep the user in all files that come after it.
                except (pa.ArrowException, KeyError) as error:
                    damaged.append(f"{path} ({error})")
        if damaged:
            raise ChangesError(
                "A user who was erased may still be in files that cannot be read: "
                f"{', '.join(damaged)}. Delete or restore them, and erase again."
            )
        return count

    def close(self) -> None:
        """Writes what is there, and ends."""
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        is_closed = False
        while not is_closed:
            is_closed = self._is_closed.wait(LOOK_SECONDS)
            with self._lock:
                try:
                    self._take()
                except Exception:
                    logging.exception("An answer could not be written as impressions.")
                    self.lost += 1
                if is_closed or time.monotonic() - self._since >= self._seconds:
                    self._write()

    def _take(self) -> None:
        """Makes rows of the answers that wait."""
        while self._shown:
            # Column by column: a row for each item would be an object each, for many thousands a
            # second.
            columns = self._columns
            at, user, read_user, offset, answer = self._shown.popleft()
            items = answer.items
            count = len(items)
            user_id = None if user is None else read_user(user)
            columns["recommendation_id"] += [answer.recommendation_id] * count
            columns["time"] += [round(1e6 * at)] * count
            columns["user_id"] += [user_id] * count
            columns["item_id"] += [item.item_id for item in items]
            columns["position"] += range(offset + 1, offset + count + 1)
            columns["score"] += [item.score for item in items]
            columns["source"] += [item.source for item in items]
            columns["propensity"] += [item.propensity for item in items]
            columns["best"] += [item.best for item in items]
            columns["model_version"] += [answer.model_version] * count
            if len(columns["item_id"]) >= MAX_ROWS:
                self._write()

    def _write(self) -> None:
        """Writes a file of the rows, and deletes files for which there is no room."""
        self._since = time.monotonic()
        columns = self._columns
        if not columns["item_id"]:
            return
        self._columns = {name: [] for name in SCHEMA.names}
        # In the order of time, and unlike those of any other process.
        now = datetime.datetime.now(datetime.UTC)
        name = f"impressions-{now:%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}.parquet"
        try:
            # Whoever reads the folder meanwhile sees whole files alone.
            with atomic(self.folder / name) as path:
                pq.write_table(pa.table(columns, SCHEMA), path, compression="zstd")
            self._make_room()
        # The server answers on, and the next file is tried: the thread must not end by it.
        except Exception as error:
            self.lost += len(set(columns["recommendation_id"]))
            logging.error("Impressions could not be written: %s", error)

    def _make_room(self) -> None:
        sizes = {}
        # The names begin with the time, so that the oldest come first.
        for path in sorted(self.folder.glob(PATTERN)):
            sizes[path] = _size(path)
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total <= self._bytes:
                break
            # Another process may be doing the same.
            path.unlink(missing_ok=True)
            total -= size


def _erase(path: Path, user_id: str) -> int:
    """Writes a file anew without the rows of a user, and returns their number."""
    file = pq.ParquetFile(path)
    # One column first: most files hold nothing of a user.
    users = file.read(columns=["user_id"])["user_id"]
    is_other = pc.fill_null(pc.not_equal(users, user_id), True)
    count = len(users) - int(pc.sum(is_other).as_py() or 0)
    if count:
        kept = file.read().filter(is_other)
        with atomic(path) as new:
            pq.write_table(kept, new, compression="zstd")
    return count


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read_impressions(folder: Path | str) -> pa.Table:
    """Returns the impressions in a folder, in the order of their files.

    Raises:
        ConfigError: There are none.
    """
    paths = sorted(Path(folder).glob(PATTERN))
    if not paths:
        raise ConfigError(
            f"--impressions={folder} holds no impressions: no file is named {PATTERN}. Name the "
            "folder that `twotower serve --impressions=FOLDER` writes to."
        )
    return pa.concat_tables(_read(paths))


def _read(paths: Iterable[Path]) -> list[pa.Table]:
    tables = []
    for path in paths:
        try:
            tables.append(pq.read_table(path).cast(SCHEMA))
        except (pa.ArrowException, ValueError) as error:
            raise ConfigError(f"{path} holds no impressions: {error}. Move it away.") from None
    return tables
