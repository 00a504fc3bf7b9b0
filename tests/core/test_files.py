"""The encoder's folder: the same bits after a round trip; whole or not at all; corrupt and foreign
ones refused."""

import json
import os

import numpy as np
import pytest
from etils import epath

from tests.features.encoder_shop import assert_same, encode_all, fitted, shop
from twotower.core.errors import FolderError
from twotower.core.files import atomic, replacing
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
            "it lacks vocabulary_0_bytes.npy",
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


def test_replacing_a_folder_that_is_not_there(tmp_path):
    with replacing(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["file"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_whenever_a_replacement_is_killed_the_next_one_still_has_a_folder_to_replace(
    tmp_path, renames
):
    """Killed after so many renames, with nothing tidied; the next one fails in its block."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / "folder.12.tmp").mkdir()  # of a killed one that got less far
    (tmp_path / "folder.mine.tmp").touch()  # nobody's but the user's
    if renames:
        (tmp_path / "folder").rename(tmp_path / "folder.345.old.tmp")
        (tmp_path / "folder.345.tmp").mkdir()
    if renames == 2:
        (tmp_path / "folder.345.tmp").rename(tmp_path / "folder")
        (tmp_path / "folder" / "new").touch()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "folder"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder", "folder.mine.tmp"]
    assert names(tmp_path / "folder") == ["new" if renames == 2 else "old"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    rename = type(epath.Path(tmp_path)).rename

    def fails(path, target):
        if target == tmp_path / "folder" and not path.name.endswith(".old.tmp"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", fails)
    with pytest.raises(OSError, match="no"), replacing(tmp_path / "folder") as new:
        (new / "new").touch()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["old"]


def test_a_saved_folder_is_recovered_too(tmp_path):
    fitted().save(tmp_path / "encoder")
    (tmp_path / "encoder").rename(tmp_path / "encoder.7.old.tmp")
    fitted({"user": {}, "item": {}}).save(tmp_path / "encoder")
    assert names(tmp_path) == ["encoder"]
