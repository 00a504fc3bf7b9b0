"""The encoder's folder: the same bits after a round trip; whole or not at all; corrupt and foreign ones refused."""

import json

import numpy as np
import pytest
from encoder_shop import assert_same, encode_all, fitted, shop

from twotower.data.encoder import Encoder
from twotower.data.folders import FolderError


def test_a_saved_encoder_encodes_the_same_bits(tmp_path):
    encoder = fitted()
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert_same(encode_all(again, shop(seed=1)), encode_all(encoder, shop(seed=1)))
    assert (again.spec, again.context, again.fitted_on) == (encoder.spec, encoder.context, encoder.fitted_on)
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


@pytest.mark.parametrize("harm, message", [
    (lambda folder: (folder / "encoder.json").unlink(), "holds no encoder: there is no encoder.json"),
    (lambda folder: (folder / "encoder.json").write_text("{"), "encoder.json is corrupt: it is not JSON"),
    (lambda folder: (folder / "encoder.json").write_bytes(b"\xff\xfe"), "encoder.json is corrupt: it is not JSON"),
    (lambda folder: (folder / "encoder.json").write_text('{"layers": 3}'), "encoder.json was not written by twotower"),
    (lambda folder: (folder / "vocabulary_0_bytes.npy").unlink(), "it lacks vocabulary_0_bytes.npy"),
    (lambda folder: flip_a_byte(folder / "vocabulary_0_bytes.npy"), "vocabulary_0_bytes.npy is corrupt"),
    (lambda folder: flip_a_number(folder / "encoder.json"), "encoder.json is corrupt: its sha256"),
    (lambda folder: set_version(folder / "encoder.json"), "has version 99; this twotower reads version 1"),
])  # fmt: skip
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
