"""The log of changes: what is acknowledged is there, what was cut off is not, and anything else is
refused."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.errors import ChangesError
from twotower.retrieval.live import log as changes
from twotower.retrieval.live.log import (
    FIRST,
    HEAD,
    ChangeLog,
    decode,
    encode_delete,
    encode_upsert,
    read_changes,
    write_log,
)

SHA, OTHER = "ab" * 32, "cd" * 32
PAYLOADS = [b"Dfirst", b"U" + bytes(range(256)), b"D[]"]


@pytest.fixture
def log(tmp_path):
    """A log of three records, closed."""
    log = ChangeLog(tmp_path / "b.changes", SHA)
    for payload in PAYLOADS:
        log.append(payload)
    log.close()
    return log.path


def ends(log):
    sizes = np.cumsum([FIRST, *(HEAD.size + len(p) for p in PAYLOADS)])
    assert sizes[-1] == log.stat().st_size
    return sizes.tolist()


def test_what_is_appended_is_read_and_gone_on_with(log):
    assert read_changes(log, SHA) == (PAYLOADS, ends(log)[-1])
    again = ChangeLog(log, SHA, ends(log)[-1])
    again.append(b"Dmore")
    assert read_changes(log, SHA)[0] == [*PAYLOADS, b"Dmore"]


def test_changes_survive_as_they_were():
    times = pa.array([1, 2], pa.timestamp("s"))
    table = pa.table(
        {"item_id": ["a", "b"], "tags": [["x"], None], "price": [1.5, None], "when": times}
    )
    vectors = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    items, found = decode(encode_upsert(table, vectors))
    assert items.equals(table)
    np.testing.assert_array_equal(found, vectors)
    assert decode(encode_delete(["a", "ü\n"])) == ["a", "ü\n"]


def test_wherever_a_write_was_cut_off_only_that_change_is_lost(log):
    data, bounds = log.read_bytes(), ends(log)
    for length in range(len(data)):
        log.write_bytes(data[:length])
        whole = sum(end <= length for end in bounds[1:])
        payloads, end = read_changes(log, SHA)
        assert payloads == PAYLOADS[:whole] and end == (bounds[whole] if length >= FIRST else 0)
        again = ChangeLog(log, SHA, end)
        again.append(b"Dnext")
        again.close()
        assert read_changes(log, SHA)[0] == [*PAYLOADS[:whole], b"Dnext"]


def test_any_flipped_bit_is_refused_by_name(log):
    data = log.read_bytes()
    for at in range(len(data)):
        for bit in (0, 7):
            log.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            with pytest.raises(ChangesError, match=r"b\.changes"):
                read_changes(log, SHA)


def test_a_log_of_another_bundle_is_refused(log):
    with pytest.raises(ChangesError, match="another bundle"):
        read_changes(log, OTHER)
    log.write_bytes(b"something")
    with pytest.raises(ChangesError, match="not a log of changes"):
        read_changes(log, SHA)


def test_a_disk_that_refuses_leaves_the_log_as_it_was(log, monkeypatch):
    end = ends(log)[-1]
    writer = ChangeLog(log, SHA, end)

    def full(file, data):
        file.write(data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(changes, "write_all", full)
        with pytest.raises(OSError, match="No space"):
            writer.append(b"Dlost")
    assert log.stat().st_size == end
    writer.append(b"Dkept")
    assert read_changes(log, SHA)[0] == [*PAYLOADS, b"Dkept"]


def test_after_a_failed_sync_nothing_more_is_acknowledged(log, monkeypatch):
    writer = ChangeLog(log, SHA, ends(log)[-1])

    def fails(descriptor):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output"):
            writer.append(b"Dunknown")
    with pytest.raises(ChangesError, match="cannot be written any more"):
        writer.append(b"Dnext")


@pytest.mark.parametrize("known", [True, False])
def test_a_change_is_on_the_disk_when_it_is_acknowledged(tmp_path, monkeypatch, known):
    """Written before it is synced, synced before it is acknowledged; of a new file the folder
    too."""
    order, sync = [], os.fsync
    log = ChangeLog(tmp_path / "b.changes", SHA)
    if known:
        log.append(b"Dfirst")
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: order.append(os.fstat(descriptor).st_size) or sync(descriptor),
    )
    log.append(b"D12345")
    size = log.path.stat().st_size
    assert order[-1] == size and (len(order) == 1 if known else len(order) == 3)


def test_one_process_writes(log):
    writer = ChangeLog(log, SHA, ends(log)[-1])
    writer.append(b"Dmine")
    code = """if True:
        import sys
        from pathlib import Path
        from twotower.retrieval.live.log import ChangeLog, ChangesError, read_changes
        path = Path(sys.argv[1])
        try:
            ChangeLog(path, sys.argv[2], read_changes(path, sys.argv[2])[1]).append(b"Dtheirs")
        except ChangesError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(log), SHA], capture_output=True, text=True
    )
    assert "being written by another process" in done.stdout, done.stderr
    stale = ChangeLog(log, SHA, ends_before := writer.end - HEAD.size - len(b"Dmine"))
    writer.close()
    with pytest.raises(ChangesError, match="since it was read"):
        stale.append(b"Dover")
    with pytest.raises(ChangesError, match="since it was read"):
        ChangeLog(log, SHA).append(b"Dover")
    assert read_changes(log, SHA)[0] == [*PAYLOADS, b"Dmine"] and ends_before > FIRST


def test_the_end_of_a_log_goes_into_the_next(log, tmp_path):
    bounds = ends(log)
    old = ChangeLog(log, SHA, bounds[-1])
    for start, left in ((0, 3), (bounds[1], 2), (bounds[3], 0)):
        write_log(tmp_path / "new.changes", OTHER, old.tail(start))
        assert read_changes(tmp_path / "new.changes", OTHER)[0] == PAYLOADS[3 - left :]
    assert not list(tmp_path.glob("*.tmp"))
