"""The log of changes: what is acknowledged is there, what was interrupted is not, and anything else
is refused."""

import functools
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.errors import ChangesError
from twotower.retrieval.live import log as log_module
from twotower.retrieval.live.log import ChangeLog, Delete, Upsert, decode, encode

SHA = "ab" * 32
OTHER = "cd" * 32
CHANGES = [
    Delete(("first",)),
    Upsert(pa.table({"item_id": ["a", "b"]}), np.arange(6, dtype=np.float32).reshape(2, 3)),
    Delete(("long" * 2_000,)),  # more than one page of the database
]


def write(log, *changes):
    """Appends in one transaction, and returns what others had written."""
    with log.transaction() as missed:
        for change in changes:
            log.add(change)
    return missed


def encoded(changes):
    return [encode(change) for change in changes]


def read(path, sha256=SHA):
    """The changes in a log, as whoever comes next reads them."""
    log = ChangeLog(path, sha256)
    try:
        return encoded(log.read())
    finally:
        log.close()


@pytest.fixture
def path(tmp_path):
    """A log of three changes, closed."""
    log = ChangeLog(tmp_path / "b.changes", SHA)
    for change in CHANGES:
        write(log, change)
    log.close()
    return log.path


def test_what_is_written_is_read_and_gone_on_with(path):
    log = ChangeLog(path, SHA)
    assert encoded(log.read()) == encoded(CHANGES)
    assert log.last == 3
    write(log, Delete(("x",)), Delete(("y",)))
    assert read(path) == encoded([*CHANGES, Delete(("x",)), Delete(("y",))])
    assert encoded(log.since(2)) == encoded([CHANGES[2], Delete(("x",)), Delete(("y",))])
    assert log.since(5) == []


def test_without_a_file_there_are_no_changes(tmp_path):
    log = ChangeLog(tmp_path / "b.changes", SHA)
    assert log.read() == []
    assert not log.path.exists()


def test_changes_survive_as_they_were():
    times = pa.array([1, 2], pa.timestamp("s"))
    table = pa.table(
        {"item_id": ["a", "b"], "tags": [["x"], None], "price": [1.5, None], "when": times}
    )
    vectors = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    change = decode(*encode(Upsert(table, vectors)))
    assert change.items.equals(table)
    np.testing.assert_array_equal(change.vectors, vectors)
    assert decode(*encode(Delete(("a", "ü\n")))) == Delete(("a", "ü\n"))


KILLED = """if True:
    import sys
    from pathlib import Path
    from twotower.retrieval.live.log import ChangeLog, Delete
    log = ChangeLog(Path(sys.argv[1]), sys.argv[2])
    log.read()
    with log.transaction():
        # Pages leave the small cache, and overwrite the file, before the transaction ends.
        log._connection.execute("PRAGMA cache_size=2")
        for number in range(200):
            log.add(Delete((f"lost {number}" * 100,)))
        print("writing", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("known", [True, False])
def test_a_change_that_a_kill_interrupted_is_undone(path, tmp_path, known):
    """Half of it is in the file already, and the journal beside it."""
    if not known:
        path = tmp_path / "new.changes"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), SHA],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "writing\n"
    assert path.with_name(f"{path.name}-journal").exists()
    if known:
        assert b"lost 7" in path.read_bytes()
    writer.kill()
    writer.communicate()
    before = CHANGES if known else []
    assert read(path) == encoded(before)
    log = ChangeLog(path, SHA)
    log.read()
    write(log, Delete(("next",)))
    assert read(path) == encoded([*before, Delete(("next",))])


def test_any_flipped_bit_is_refused_by_name_or_changes_nothing(path):
    """Bytes that say nothing exist in a database; all that belong to a change are checked."""
    data = path.read_bytes()
    expected = read(path)
    refused = np.zeros(len(data), bool)
    rng = np.random.default_rng(0)
    # The first bytes of each page, which describe it, and some of the others.
    others = rng.choice(len(data), 250, replace=False)
    for at in {*others.tolist(), *(i for i in range(len(data)) if i % 4096 < 64)}:
        bit = 1 << int(rng.integers(8))
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        try:
            assert read(path) == expected, (at, bit)
        except ChangesError as error:
            assert "b.changes" in str(error)
            refused[at] = True
    path.write_bytes(data)
    for payload in (payload for _, payload in expected):
        start = data.find(payload[:200])
        assert start > 0
        for at in (start, start + len(payload) // 40):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(ChangesError, match=r"b\.changes is damaged.* Restore the file"):
                read(path)
    assert refused.sum() > 150


def test_a_log_that_was_cut_off_is_refused(path):
    data = path.read_bytes()
    for length in range(256, len(data), 256):
        path.write_bytes(data[:length])
        with pytest.raises(ChangesError, match=r"b\.changes is damaged"):
            read(path)


def test_a_row_that_is_gone_is_noticed(path):
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM changes WHERE n = 2")
    connection.close()
    with pytest.raises(ChangesError, match="damaged at change 2"):
        read(path)


def test_a_file_that_is_no_log_of_this_bundle_is_refused(path):
    with pytest.raises(ChangesError, match="another bundle"):
        read(path, OTHER)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(ChangesError, match="has version 7; this twotower reads version 1"):
        read(path)
    path.write_bytes(b"something else")
    with pytest.raises(ChangesError, match="damaged: file is not a database"):
        read(path)
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE changes (n)")
    connection.close()
    with pytest.raises(ChangesError, match="not a log of changes"):
        read(path)


def test_a_log_of_an_older_twotower_is_refused_with_the_way_out(path):
    path.write_bytes(b"2TOWERCH" + bytes.fromhex(SHA) + bytes(60))
    with pytest.raises(ChangesError, match=r"older twotower.*compact\(\), or move the file away"):
        read(path)
    with pytest.raises(ChangesError, match="older twotower"):
        write(ChangeLog(path, SHA), Delete(("x",)))


def test_a_full_disk_leaves_the_log_as_it_was(path):
    log = ChangeLog(path, SHA)
    log.read()
    (pages,) = log._connection.execute("PRAGMA page_count").fetchone()
    log._connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(OSError, match="was not made: database or disk is full"):
        write(log, Delete(("lost" * 5_000,)))
    assert read(path) == encoded(CHANGES)
    log._connection.execute("PRAGMA max_page_count=1000")
    write(log, Delete(("kept",)))
    assert read(path) == encoded([*CHANGES, Delete(("kept",))])


class FailingConnection(sqlite3.Connection):
    """A connection whose disk fails when a transaction is to be committed."""

    def execute(self, statement, *values):
        if statement == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return super().execute(statement, *values)


def test_after_a_failed_sync_nothing_more_is_acknowledged(path, monkeypatch):
    failing = functools.partial(sqlite3.connect, factory=FailingConnection)
    monkeypatch.setattr(log_module.sqlite3, "connect", failing)
    log = ChangeLog(path, SHA)
    log.read()
    with pytest.raises(OSError, match="disk I/O error"):
        write(log, Delete(("unknown",)))
    with pytest.raises(ChangesError, match="cannot be written any more"):
        write(log, Delete(("next",)))


def test_what_is_too_large_is_refused_before_it_is_written(path, monkeypatch):
    monkeypatch.setattr(log_module, "MAX_CHANGE_BYTES", 50)
    log = ChangeLog(path, SHA)
    log.read()
    with pytest.raises(ChangesError, match="may hold 50 bytes, not 64"):
        write(log, Delete(("small",)), Delete(("x" * 60,)))
    assert read(path) == encoded(CHANGES)


def test_a_commit_waits_for_the_disk(path):
    """By SQLite's own means: a journal that is deleted, and the folder synced after that."""
    log = ChangeLog(path, SHA)
    log.read()
    settings = {
        name: log._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "locking_mode")
    }
    assert settings == {"journal_mode": "delete", "synchronous": 3, "locking_mode": "normal"}


def test_two_writers_take_turns_and_see_what_the_other_wrote(path):
    mine = ChangeLog(path, SHA)
    theirs = ChangeLog(path, SHA)
    for log in (mine, theirs):
        log.read()
    assert write(mine, Delete(("mine",))) == []
    assert write(theirs, Delete(("theirs",))) == [Delete(("mine",))]
    assert write(mine) == [Delete(("theirs",))]
    assert mine.last == theirs.last == 5
    assert read(path) == encoded([*CHANGES, Delete(("mine",)), Delete(("theirs",))])


def test_while_one_writes_another_waits_and_a_reader_does_not(path, monkeypatch):
    monkeypatch.setattr(log_module, "BUSY_SECONDS", 0.1)
    mine = ChangeLog(path, SHA)
    theirs = ChangeLog(path, SHA)
    for log in (mine, theirs):
        log.read()
    with mine.transaction():
        mine.add(Delete(("mine",)))
        assert read(path) == encoded(CHANGES)
        with pytest.raises(ChangesError, match="held by another process for 0.1 seconds"):
            write(theirs, Delete(("theirs",)))
    assert write(theirs) == [Delete(("mine",))]


def test_writers_of_one_new_log_lose_nothing(tmp_path):
    path = tmp_path / "b.changes"
    failures = []

    def work(name):
        try:
            log = ChangeLog(path, SHA)
            for number in range(10):
                write(log, Delete((f"{name}{number}",)))
            log.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = [decode(*change).ids[0] for change in read(path)]
    assert sorted(found) == sorted(f"{name}{number}" for name in "abc" for number in range(10))
    for name in "abc":
        assert [item for item in found if item[0] == name] == [f"{name}{n}" for n in range(10)]


def test_a_log_that_was_moved_away_takes_no_more_changes(path):
    log = ChangeLog(path, SHA)
    log.read()
    path.unlink()
    with pytest.raises((ChangesError, OSError), match="moved|changes"):
        write(log, Delete(("lost",)))
