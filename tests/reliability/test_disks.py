"""Whatever write a disk fills at, or a process is killed at, nothing acknowledged is lost, what was
there still loads, and a full disk is told in a line that names the folder and the cure."""

import contextlib
import errno
import os
import shutil
import subprocess
import threading

import jax.numpy as jnp
import pytest

from tests.reliability.faults import Killed, sweep
from twotower.core.errors import TwotowerError
from twotower.core.files import explain_full_disk, is_disk_full
from twotower.retrieval import export as export_module
from twotower.retrieval.export import export, make_bundle
from twotower.retrieval.retriever import Retriever
from twotower.training.checkpoint import Checkpoints
from twotower.training.metrics import MetricWriter

# Every write is tried by hand, in minutes: `EVERY=1 pytest ...`.
EVERY = "EVERY" in os.environ
CHANGES = [{"item_id": "new", "price": 3.0}, {"item_id": "newer", "price": 4.0}]


@pytest.fixture
def served(exported, tmp_path):
    """A function that makes a bundle with a change in its log, and loads it."""

    def make():
        folder = tmp_path / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported, folder)
        retriever = Retriever.load(folder)
        retriever.upsert(CHANGES[:1])
        return retriever

    return make


def check_whole(retriever, error):
    """After a failure: the changes are there, for a server that goes on and for a new one."""
    folder = retriever.bundle.folder
    # What is only tidied up may fail without a word.
    if error is not None and not isinstance(error, Killed):
        assert retriever.item("new")
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC, error
        assert error.filename and "Make room" in str(error)
        # Half of a version does not stay, as the disk is full already.
        assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
    again = Retriever.load(folder)
    assert again.item("new")
    again.upsert(CHANGES[1:])
    assert Retriever.load(folder).item("newer")


@pytest.mark.slow
@pytest.mark.parametrize("is_kill", [False, True], ids=["full", "killed"])
def test_a_compaction(served, monkeypatch, is_kill):
    count = sweep(served, Retriever.compact, check_whole, monkeypatch, is_kill=is_kill, every=EVERY)
    assert count > 20


@pytest.mark.slow
@pytest.mark.parametrize("is_kill", [False, True], ids=["full", "killed"])
def test_an_export(served, run, monkeypatch, is_kill):
    bundle = make_bundle(run)
    monkeypatch.setattr(export_module, "make_bundle", lambda *args, **options: bundle)
    monkeypatch.setattr(export_module, "check_parity", lambda *args, **options: None)

    def work(retriever):
        export(run, retriever.bundle.folder)

    assert sweep(served, work, check_whole, monkeypatch, is_kill=is_kill, every=EVERY) > 20


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of a size in bytes, or another size of it; skips where this user
    may not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size):
        options = f"size={size}" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a tmpfs")
        mounted.append(size)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Fills a disk up to some bytes."""
    free = shutil.disk_usage(folder).free
    with open(folder / "filler", "wb") as file:
        file.write(bytes(max(0, free - leave)))


@pytest.mark.parametrize("leave", [0, 4_096, 12_288])
@pytest.mark.parametrize("before", [0, 2])
def test_a_change_on_a_full_disk_is_refused_and_the_next_ones_hold(
    exported, small_disk, leave, before
):
    """The first change, which begins the log, and a later one."""
    disk = small_disk(8_000_000)
    shutil.copytree(exported, disk / "bundle")
    retriever = Retriever.load(disk / "bundle")
    expected = len(retriever)
    for number in range(before):
        expected = retriever.upsert([{"item_id": f"before {number}"}])
    fill(disk, leave)
    refused = False
    for number in range(20):
        try:
            expected = retriever.upsert([{"item_id": f"full {number}", "title": "x" * 5_000}])
        except OSError as error:
            assert error.errno == errno.ENOSPC and "Make room" in str(error)
            refused = True
            break
    assert refused
    assert len(Retriever.load(disk / "bundle")) == expected == len(retriever)
    (disk / "filler").unlink()
    assert retriever.upsert([{"item_id": "after"}]) == expected + 1
    again = Retriever.load(disk / "bundle")
    assert again.item("after") and len(again) == expected + 1


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(small_disk):
    state = {"table": jnp.arange(100_000.0)}
    disk = small_disk(10_000_000)
    options = {"metric": "m", "keep": 2, "run": "r"}
    with Checkpoints(disk / "run", **options) as checkpoints:
        checkpoints.save(1, state, record={}, metrics={"m": 0.5})
    fill(disk, 50_000)
    with pytest.raises(OSError, match="the disk is full. Make room. Again.") as caught:
        with explain_full_disk(disk, "Again."), Checkpoints(disk / "run", **options) as checkpoints:
            checkpoints.save(2, state, record={}, metrics={"m": 0.7})
    assert caught.value.filename == str(disk)
    (disk / "filler").unlink()
    with Checkpoints(disk / "run", **options) as checkpoints:
        assert checkpoints.latest() == checkpoints.best() == 1
        checkpoints.save(2, state, record={}, metrics={"m": 0.7})
        checkpoints.wait()
        assert checkpoints.best() == 2


def test_a_save_that_failed_is_told_by_the_next_one_and_no_step_is_dropped(small_disk):
    """Orbax below 0.12.10 drops steps after a failed save: no further one may be asked of it."""
    state = {"table": jnp.arange(100_000.0)}
    disk = small_disk(10_000_000)
    options = {"metric": "m", "keep": 2, "run": "r"}
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(disk / "run", **options))
        checkpoints.save(1, state, record={}, metrics={})
        checkpoints.wait()
        fill(disk, 50_000)
        checkpoints.save(2, state, record={}, metrics={})
        # There is room again before anybody asks how the save ended.
        while any(thread.name == "save_finalize" for thread in threading.enumerate()):
            threading.Event().wait(0.01)
        (disk / "filler").unlink()
        with pytest.raises(Exception) as caught:
            checkpoints.save(3, state, record={}, metrics={})
        assert is_disk_full(caught.value)
        stack.pop_all()
    with Checkpoints(disk / "run", **options) as again:
        assert again.latest() == 1
        for step in (2, 3):
            again.save(step, state, record={}, metrics={})
        again.wait()
        assert again.latest() == 3


def test_a_folder_that_cannot_be_written_is_told_at_once_and_nothing_waits_for_it(small_disk):
    """Orbax's threads would wait for twenty minutes, and the process could not end."""
    disk = small_disk(10_000_000)
    state = {"table": jnp.arange(10.0)}
    with Checkpoints(disk / "run", metric="m", keep=2, run="r") as checkpoints:
        checkpoints.save(1, state, record={}, metrics={})
        checkpoints.wait()
        folder = str(disk / "run")
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        before = threading.active_count()
        try:
            with pytest.raises(OSError, match="Read-only file system"):
                checkpoints.save(2, state, record={}, metrics={})
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        assert threading.active_count() == before
        checkpoints.save(2, state, record={}, metrics={})
        checkpoints.wait()
        assert checkpoints.latest() == 2


@pytest.mark.parametrize("file", ["metrics.jsonl", "tensorboard"])
def test_metrics_on_a_full_disk_end_training_at_once(tmp_path, monkeypatch, file):
    """`SummaryWriter` waits for ever here."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    if file == "metrics.jsonl":
        (tmp_path / file).symlink_to("/dev/full")
        # What it holds is read first, which never ends.
        monkeypatch.setattr("twotower.training.metrics._truncate", lambda path, start: None)
    else:
        from tensorboardX import record_writer

        opened = record_writer.open_file
        monkeypatch.setattr(record_writer, "open_file", lambda path: opened("/dev/full"))
    with pytest.raises(OSError, match="the disk is full"):
        with explain_full_disk(tmp_path, "Again."):
            with MetricWriter(tmp_path, start=0, steps=100) as writer:
                for step in range(100):
                    writer.write(step, {"loss": 1.0}, show={})


@pytest.mark.parametrize("content", [b"", b"{", b'{"m": 0.', b"\x00" * 20, b"[1]", b'{"m": "x"}'])
def test_damaged_metrics_of_one_checkpoint_keep_no_other_from_being_opened(tmp_path, content):
    options = {"metric": "m", "keep": 3, "run": "r"}
    state = {"table": jnp.arange(3.0)}
    with Checkpoints(tmp_path / "run", **options) as checkpoints:
        for step, value in ((1, 0.5), (2, 0.9), (3, 0.1)):
            checkpoints.save(step, state, record={"step": step}, metrics={"m": value})
    (tmp_path / "run" / "2" / "metrics" / "metrics").write_bytes(content)
    with Checkpoints(tmp_path / "run", **options, read_only=True) as checkpoints:
        assert checkpoints.best() == 1
        assert checkpoints.latest() == 3
        assert checkpoints.record(2) == {"step": 2}
    with Checkpoints(tmp_path / "run", **options) as checkpoints:
        checkpoints.save(4, state, record={}, metrics={"m": 0.2})
        checkpoints.wait()
        assert checkpoints.best() == 1


def test_a_disk_that_is_full_is_known_by_the_words_of_each_library(tmp_path):
    for error in (
        OSError(errno.EDQUOT, "quota"),
        ValueError("RESOURCE_EXHAUSTED: ... Failed to write: No space left on device [28]"),
        OSError("50 requested and 7 written"),
    ):
        with pytest.raises(OSError, match="disk is full"), explain_full_disk(tmp_path, "Again."):
            try:
                raise error
            finally:
                with contextlib.suppress(KeyError):
                    raise KeyError
    with pytest.raises(TwotowerError), explain_full_disk(tmp_path, "Again."):
        raise TwotowerError("RESOURCE_EXHAUSTED: out of memory on the device")
