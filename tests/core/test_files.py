"""Files and folders that change all at once: the encoder's folder, single files, versions."""

import json
import os

import numpy as np
import pytest
from etils import epath

from tests.features.encoder_shop import assert_same, encode_all, fitted, shop
from twotower.core import files
from twotower.core.errors import FolderError
from twotower.core.files import (
    atomic,
    current_version,
    new_version,
    publish_version,
    read_folder,
    write_folder,
)
from twotower.features.encoder import Encoder


def test_a_saved_encoder_encodes_the_same_bits(tmp_path):
    encoder = fitted()
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert_same(encode_all(again, shop(seed=1)), encode_all(encoder, shop(seed=1)))
    assert (again.spec, again.context, again.fitted_on) == (
        encoder.spec,
        encoder.context,
        encoder.fitted_on,
    )
    assert (again.inputs, again.tables.keys()) == (encoder.inputs, encoder.tables.keys())
    assert {path.suffix for path in (tmp_path / "encoder").iterdir()} == {".json", ".npy"}


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    fitted().save(tmp_path / "encoder")
    fitted({"user": {}, "item": {}}).save(tmp_path / "encoder")
    assert list(Encoder.load(tmp_path / "encoder").inputs["item"]) == ["item_id"]
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda folder: (folder / "encoder.json").unlink(),
            "holds no encoder: there is no encoder.json",
        ),
        (
            lambda folder: (folder / "encoder.json").write_text("{"),
            "encoder.json is corrupt: it is not JSON",
        ),
        (
            lambda folder: (folder / "encoder.json").write_bytes(b"\xff\xfe"),
            "encoder.json is corrupt: it is not JSON",
        ),
        (
            lambda folder: (folder / "encoder.json").write_text('{"layers": 3}'),
            "encoder.json was not written by twotower",
        ),
        (
            lambda folder: (folder / "vocabulary_0_bytes.npy").unlink(),
            "vocabulary_0_bytes.npy is missing",
        ),
        (
            lambda folder: flip_a_byte(folder / "vocabulary_0_bytes.npy"),
            "vocabulary_0_bytes.npy is corrupt",
        ),
        (
            lambda folder: flip_a_number(folder / "encoder.json"),
            "encoder.json is corrupt: its sha256",
        ),
        (
            lambda folder: set_version(folder / "encoder.json"),
            "has version 99; this twotower reads version 1",
        ),
    ],
)
def test_a_corrupt_or_foreign_folder_is_refused(tmp_path, harm, message):
    fitted().save(tmp_path / "encoder")
    harm(tmp_path / "encoder")
    with pytest.raises(FolderError, match=message):
        Encoder.load(tmp_path / "encoder")


def flip_a_number(path):
    content = json.loads(path.read_text())
    content["state"]["context"] = []
    path.write_text(json.dumps(content))


def set_version(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def test_a_save_that_dies_leaves_the_old_encoder(tmp_path, monkeypatch):
    encoder = fitted()
    encoder.save(tmp_path / "encoder")

    def die(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", die)
    with pytest.raises(OSError):
        fitted({}).save(tmp_path / "encoder")
    assert Encoder.load(tmp_path / "encoder").spec == encoder.spec
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_file_is_seen_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "file"
    for content in ("first", "second"):
        with atomic(path) as temporary:
            temporary.write_text(content)
            assert path.exists() == (content == "second")
        assert path.read_text() == content
    assert names(path.parent) == ["file"]


def test_an_atomic_file_that_fails_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "old"


def test_an_atomic_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []

    def record(name, function):
        return lambda *args: (order.append(name), function(*args))

    monkeypatch.setattr(os, "fsync", record("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", record("replace", os.replace))
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert order == ["fsync", "replace"]


def write_version(folder, name):
    """A version with one file, not current yet."""
    version = new_version(folder)
    (version / name).write_text("x")
    return version


def test_a_folder_without_versions_is_its_own_content(tmp_path):
    assert current_version(tmp_path) == tmp_path
    assert current_version(tmp_path / "missing") == tmp_path / "missing"


def test_a_version_is_seen_when_it_is_published(tmp_path):
    folder = tmp_path / "folder"
    for number in (1, 2, 3):
        version = write_version(folder, f"file{number}")
        assert current_version(folder) == (folder / f"v-{number - 1}" if number > 1 else folder)
        publish_version(version)
        assert current_version(folder) == version == folder / f"v-{number}"
    # The one before stays for those who are loading it.
    assert names(folder) == ["current", "v-2", "v-3"]
    assert names(tmp_path) == ["folder"]


def test_a_version_that_was_never_finished_is_deleted_by_the_next(tmp_path):
    publish_version(write_version(tmp_path, "first"))
    write_version(tmp_path, "half")
    assert current_version(tmp_path) == tmp_path / "v-1"
    publish_version(write_version(tmp_path, "third"))
    assert names(tmp_path) == ["current", "v-1", "v-3"]


def test_a_version_that_another_process_is_writing_is_left_alone(tmp_path):
    mine = write_version(tmp_path, "mine")
    theirs = write_version(tmp_path, "theirs")
    assert mine != theirs
    publish_version(mine)
    publish_version(theirs)
    assert current_version(tmp_path) == theirs
    assert names(tmp_path) == ["current", "v-1", "v-2"]


def test_content_from_before_the_first_version_is_replaced(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "v-1.0123.changes").touch()
    publish_version(write_version(tmp_path, "new"))
    assert names(tmp_path) == ["current", "v-1", "v-1.0123.changes"]


def test_a_file_of_a_deleted_version_that_is_mapped_stays_readable(tmp_path):
    version = new_version(tmp_path)
    np.save(version / "x.npy", np.arange(5))
    publish_version(version)
    mapped = np.load(current_version(tmp_path) / "x.npy", mmap_mode="r")
    for _ in range(2):
        publish_version(write_version(tmp_path, "y"))
    assert not version.exists()
    assert mapped.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["v-7", "../other", "", "v-1/..", "\udcff"])
def test_a_pointer_to_nothing_is_refused_and_can_be_replaced(tmp_path, name):
    publish_version(write_version(tmp_path, "x"))
    (tmp_path / "current").write_bytes(name.encode("utf-8", "surrogateescape"))
    with pytest.raises(FolderError, match="current is corrupt: it names"):
        current_version(tmp_path)
    publish_version(write_version(tmp_path, "y"))
    assert current_version(tmp_path) == tmp_path / "v-2"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_version_that_cannot_be_published_leaves_the_old_one(tmp_path, monkeypatch, step):
    publish_version(write_version(tmp_path, "old"))
    version = write_version(tmp_path, "new")

    def fails(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, step, fails)
        publish_version(version)
    assert current_version(tmp_path) == tmp_path / "v-1"
    assert names(tmp_path) == ["current", "v-1", "v-2"]


def test_files_are_on_the_disk_before_the_pointer_names_them(tmp_path, monkeypatch):
    version = write_version(tmp_path, "file")
    order = []

    def record(name, function):
        return lambda *args: (order.append(name), function(*args))

    monkeypatch.setattr(os, "fsync", record("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", record("replace", os.replace))
    publish_version(version)
    # The folder, its file and the pointer, then the pointer's new name.
    assert order == ["fsync", "fsync", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("step", ["array", "digest", "state"])
def test_a_folder_that_is_written_again_changes_all_at_once(tmp_path, monkeypatch, step):
    """Wherever the second writing is killed, so that it tidies nothing up."""
    old = {"a": np.arange(3), "b": np.arange(2)}
    write_folder(tmp_path, "kind", {"n": 1}, old)

    class Killed(BaseException):
        pass

    def kill(*args, **options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        target = {"array": (np, "save"), "digest": (files, "digest"), "state": (json, "dumps")}[
            step
        ]
        patch.setattr(*target, kill)
        patch.setattr(type(epath.Path(tmp_path)), "unlink", lambda *args, **options: None)
        write_folder(tmp_path, "kind", {"n": 2}, {"a": np.arange(4)})
    state, arrays = read_folder(tmp_path, "kind")
    assert state == {"n": 1}
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [0, 1, 2], "b": [0, 1]}
    write_folder(tmp_path, "kind", {"n": 3}, {"b": np.arange(1)})
    state, arrays = read_folder(tmp_path, "kind")
    assert (state, list(arrays)) == ({"n": 3}, ["b"])
    assert len(names(tmp_path)) == 2
