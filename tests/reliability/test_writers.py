"""A bundle has one writer of versions at a time, and none of them takes back what another has
acknowledged."""

import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.retrieval.runs import storing
from twotower.core.errors import BusyError, ChangesError, UnknownItemError
from twotower.core.files import LOCK, current_version, exclusive
from twotower.retrieval import export as export_module
from twotower.retrieval.export import export, make_bundle
from twotower.retrieval.retriever import Retriever

BUNDLES = {}


def bundle_of(run, *args, **options):
    if run.workdir not in BUNDLES:
        BUNDLES[run.workdir] = make_bundle(run, *args, **options)
    return BUNDLES[run.workdir]


NEW = {"item_id": "new", "price": 3.0, "title": "a lamp"}


@pytest.fixture(autouse=True)
def short_exports(monkeypatch):
    """Leaves out the proof that a bundle scores as the trainer does, which has tests of its own,
    and embeds each run once."""
    monkeypatch.setattr(export_module, "check_parity", lambda *_: None)
    monkeypatch.setattr(export_module, "make_bundle", bundle_of)


@pytest.fixture
def changed(folder):
    """A server that has added an item, replaced one and deleted one."""
    server = Retriever.load(folder)
    first, second = server.bundle.items["item_id"][:2].to_pylist()
    server.upsert([NEW])
    server.upsert([{"item_id": first, "price": 77.0, "title": "replaced"}])
    assert server.delete([second]) == 1
    return server


def check_changes(retriever, server):
    first, second = server.bundle.items["item_id"][:2].to_pylist()
    assert retriever.item("new").display["title"] == "a lamp"
    assert retriever.item(first).display["price"] == 77.0
    with pytest.raises(UnknownItemError):
        retriever.item(second)
    assert len(retriever) == len(server)


def test_an_export_of_the_same_weights_carries_changes_over_with_their_vectors(
    run, folder, changed
):
    vector = np.full((1, run.model.dim), 0.5, np.float32)
    changed.upsert([{"item_id": "own vector"}], vectors=vector)
    export(run, folder)
    new = Retriever.load(folder)
    check_changes(new, changed)
    np.testing.assert_array_equal(new.item_vectors(["own vector"]), vector)
    expected = changed.item_vectors(["new"])
    np.testing.assert_array_equal(new.item_vectors(["new"]), expected)


def test_an_export_of_other_weights_embeds_the_changed_items_anew(other_run, folder, changed):
    export(other_run, folder)
    new = Retriever.load(folder)
    check_changes(new, changed)
    np.testing.assert_allclose(new.item_vectors(["new"]), new.encode_items([NEW]), atol=1e-6)
    # The next export still knows of them.
    export(other_run, folder)
    check_changes(Retriever.load(folder), changed)
    assert len(list(folder.glob("*.changes"))) == 1


def test_changes_that_were_compacted_are_carried_over_too(run, other_run, folder, changed):
    changed.compact()
    changed.upsert([{"item_id": "later", "price": 1.0, "title": "x"}])
    changed.compact()
    assert not list(folder.glob("*.changes"))
    export(other_run, folder)
    new = Retriever.load(folder)
    assert new.item("later")
    assert new.item("new").display["title"] == "a lamp"
    assert len(new) == len(changed)


def test_an_old_server_neither_changes_nor_undoes_a_newer_export(other_run, folder, changed):
    export(other_run, folder)
    newer = current_version(folder)
    for change in (
        lambda: changed.upsert([{"item_id": "late"}]),
        lambda: changed.delete(["new"]),
        changed.compact,
    ):
        with pytest.raises(ChangesError, match="was replaced by another version"):
            change()
    assert current_version(folder) == newer
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["v-1", "v-2"]
    check_changes(Retriever.load(folder), changed)


def test_a_change_while_an_export_writes_is_carried_over(other_run, folder, changed, monkeypatch):
    def acknowledge(run, version, users):
        changed.upsert([{"item_id": "meanwhile", "price": 1.0, "title": "y"}])

    monkeypatch.setattr(export_module, "check_parity", acknowledge)
    export(other_run, folder)
    assert Retriever.load(folder).item("meanwhile")


def test_changes_that_cannot_be_embedded_anew_are_refused_by_name_or_dropped(
    run, other_run, tmp_path
):
    folder = tmp_path / "bundle"
    narrow = storing(run, display=("title",))
    export(dataclasses.replace(narrow, workdir=tmp_path), folder)
    server = Retriever.load(folder)
    server.upsert([NEW])
    before = current_version(folder)
    with pytest.raises(ChangesError, match=r"reads price.*'new'.*--changes=drop"):
        export(other_run, folder)
    assert current_version(folder) == before
    assert Retriever.load(folder).item("new")
    # Deleted items need no vector.
    server.delete(["new", server.bundle.items["item_id"][0].as_py()])
    export(other_run, folder)
    assert len(Retriever.load(folder)) == len(server)
    Retriever.load(folder).upsert([NEW])
    export(other_run, folder, changes="drop")
    assert len(Retriever.load(folder)) == len(server) + 1
    assert not list(folder.glob("*.changes"))


def test_what_another_process_compacts_keeps_what_this_one_acknowledged(folder):
    mine = Retriever.load(folder)
    theirs = Retriever.load(folder)
    mine.upsert([{"item_id": "first"}])
    theirs.compact()
    with pytest.raises(ChangesError, match="Load the bundle again"):
        mine.upsert([{"item_id": "second"}])
    again = Retriever.load(folder)
    assert again.item("first")
    again.upsert([{"item_id": "second"}])
    # Compacted before the other's changes were read: they follow in the log of the new version.
    theirs = Retriever.load(folder)
    again.upsert([{"item_id": "third"}])
    theirs.compact()
    for item in ("first", "second", "third"):
        assert Retriever.load(folder).item(item) and theirs.item(item)


@pytest.mark.parametrize("first", ["export", "compact"])
def test_two_makers_of_versions_exclude_each_other(run, folder, first):
    server = Retriever.load(folder)
    makers = {"export": lambda: export(run, folder), "compact": server.compact}
    with exclusive(folder, first):
        for make in makers.values():
            with pytest.raises(BusyError, match=rf"bundle is in use by `{first}` \(process \d+ on"):
                make()
        # Answers and changes go on.
        server.upsert([NEW])
    server.compact()
    assert Retriever.load(folder).item("new")


HOLDER = """if True:
    import os, sys
    from twotower.core.files import exclusive
    with exclusive(sys.argv[1], "hold"):
        # The child itself says that it is there: it has let go of the lock by then.
        if not os.fork():
            print(os.getpid(), flush=True)
        sys.stdin.read()
"""


def test_a_lock_ends_with_the_process_that_held_it_though_a_forked_child_lives_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    with pytest.raises(BusyError, match=rf"by `hold` \(process {process.pid} on .*, since 20"):
        with exclusive(tmp_path / "run", "train"):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(child, 0)
    assert (tmp_path / "run" / LOCK).exists()
    with exclusive(tmp_path / "run", "train"):
        (tmp_path / "run" / "something").touch()
    assert (tmp_path / "run").exists()
    process.communicate()


def test_a_folder_that_was_only_locked_goes_again(tmp_path):
    with exclusive(tmp_path / "new", "train"):
        with pytest.raises(BusyError):
            with exclusive(tmp_path / "new", "train"):
                pass
        assert (tmp_path / "new" / LOCK).exists()
    assert not (tmp_path / "new").exists()


def test_a_file_system_without_locks_is_said_and_worked_on(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path / "run", "train"):
        assert (tmp_path / "run").exists()
    assert "cannot be locked here" in caplog.text
