"""Prepared data in a folder: what is loaded is what was saved, to the bit, or is refused."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from tests.pipeline.history_log import LEAKS
from twotower.config import from_dict
from twotower.core.errors import ConfigError, FolderError
from twotower.pipeline import folder
from twotower.pipeline.prepare import prepare
from twotower.training.run import local_folder

HISTORY = {"type": "history", "max_length": 4, "gaps": 4, "request_gap": True}


def config_of(path, **sections):
    """A configuration with all that prepared data may hold: histories with gaps, a context, labels,
    weights of events, packed sequences."""
    values = {
        "data": {
            "source": "csv",
            "interactions": {"path": str(path)},
            "accept": ("old_times",),
        },
        "split": {"validation": 0.2, "test": 0.2, "accept_leakage": LEAKS},
        "features": {
            "user": {"history": HISTORY, "hour/day": {"type": "float", "column": "hour"}},
            "item": {"item_id": {"type": "string", "embedding_size": 8}},
        },
        "objective": {"label": "liked"},
        "training": {"examples": "sequences"},
        "model": {"history": {"kind": "causal"}},
    }
    return from_dict(values | sections)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp,hour,liked,note"]
    for _ in range(200):
        user, item, time = rng.integers(0, (12, 20, 100))
        lines.append(f"u{user},i{item},{time * 1000},{time % 24},{time % 2},n{item}")
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def saved(log, tmp_path_factory):
    """Prepared data, and a folder that holds it."""
    prepared = prepare(config_of(log))
    path = tmp_path_factory.mktemp("saved") / "data"
    folder.save(prepared, path)
    return prepared, path


def assert_equal(loaded, saved):
    """Fails where two values differ in a bit, a type, or the order of a mapping."""
    if isinstance(saved, np.ndarray):
        assert loaded.dtype == saved.dtype
        np.testing.assert_array_equal(loaded, saved)
    elif isinstance(saved, pa.Table):
        assert loaded.schema == saved.schema
        assert loaded.equals(saved)
    elif dataclasses.is_dataclass(saved):
        assert type(loaded) is type(saved)
        for field in dataclasses.fields(saved):
            assert_equal(getattr(loaded, field.name), getattr(saved, field.name))
    elif isinstance(saved, dict):
        assert list(loaded) == list(saved)
        for name in saved:
            assert_equal(loaded[name], saved[name])
    elif isinstance(saved, tuple):
        assert len(loaded) == len(saved)
        for pair in zip(loaded, saved):
            assert_equal(*pair)
    else:
        assert loaded == saved


def test_what_is_loaded_is_what_was_saved(saved):
    prepared, path = saved
    assert prepared.packing and prepared.histories and prepared.encoder.context
    loaded = folder.load(path, prepared.config, prepared.encoder)
    assert_equal(loaded, prepared)


def test_a_generated_shop_keeps_its_true_preferences(tmp_path):
    config = from_dict({"data": {"source": "shop", "num_interactions": 1000}})
    prepared = prepare(config)
    folder.save(prepared, tmp_path)
    loaded = folder.load(tmp_path, config, prepared.encoder)
    assert_equal(loaded.truth, prepared.truth)
    assert loaded.has_catalogue


def test_histories_are_not_padded(saved):
    """Ten times the length of a history takes no byte more."""
    prepared, path = saved
    longer = dataclasses.replace(prepared.encoder.spec.history, max_length=40)
    spec = dataclasses.replace(
        prepared.encoder.spec, user={**prepared.encoder.spec.user, "history": longer}
    )
    again = prepare(config_of(prepared.config.data.interactions.path, features=spec.to_dict()))
    folder.save(again, path.parent / "longer")
    sizes = [
        sum(file.stat().st_size for file in place.glob("*.npy"))
        for place in (path, path.parent / "longer")
    ]
    assert sizes[0] == sizes[1]


def test_a_write_that_was_killed_counts_as_none(saved, tmp_path, monkeypatch):
    prepared, _ = saved
    written = []

    def killed(writer, table):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(table)

    with monkeypatch.context() as patched:
        patched.setattr(folder.TableWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save(prepared, tmp_path)
    assert not folder.is_whole(tmp_path)
    folder.save(prepared, tmp_path)
    assert_equal(folder.load(tmp_path, prepared.config, prepared.encoder), prepared)


@pytest.mark.parametrize("damage", ["cut", "missing", "other", "version"])
def test_a_damaged_folder_is_refused_by_name(saved, tmp_path, damage):
    prepared, path = saved
    folder.save(prepared, tmp_path)
    encoder = prepared.encoder
    if damage == "cut":
        file = tmp_path / "003.npy"
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        (tmp_path / "items.arrow").unlink()
    elif damage == "other":
        encoder = dataclasses.replace(encoder, fitted_on="other")
    else:
        manifest = json.loads((tmp_path / folder.MANIFEST).read_text())
        (tmp_path / folder.MANIFEST).write_text(json.dumps(manifest | {"version": 2}))
    words = {"cut": "003.npy is corrupt", "missing": "items.arrow is missing"}
    words |= {"other": "other training rows", "version": "version 2"}
    with pytest.raises(FolderError, match=words[damage]):
        folder.load(tmp_path, prepared.config, encoder)


def test_a_shared_folder_is_named_relative_and_by_its_content(saved, tmp_path):
    prepared, _ = saved
    shared = tmp_path / "shared"
    prepared.encoder.save(shared / "encoder")
    folder.save(prepared, shared)
    own = tmp_path / "runs" / "a" / "data"
    folder.share(own, shared)
    # All of it moves: the run still finds its data.
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "runs").rename(moved / "runs")
    shared.rename(moved / "shared")
    own = moved / "runs" / "a" / "data"
    assert_equal(folder.load(own, prepared.config, folder.load_encoder(own)), prepared)
    # Other data in its place is refused.
    changed = dataclasses.replace(prepared, has_catalogue=not prepared.has_catalogue)
    folder.save(changed, moved / "shared")
    with pytest.raises(FolderError, match="written again"):
        folder.load(own, prepared.config, prepared.encoder)
    folder.forget(moved / "shared")
    with pytest.raises(FolderError, match="shared.* is missing.*--data"):
        folder.load(own, prepared.config, prepared.encoder)


def test_data_of_another_configuration_is_refused_by_field(saved, log):
    _, path = saved
    folder.check_fits(path, config_of(log))
    # What decides no array may differ.
    folder.check_fits(path, config_of(log, training={"examples": "sequences", "seed": 3}))
    changes = {
        "config.split.test": {"split": {"validation": 0.2, "test": 0.1, "accept_leakage": LEAKS}},
        "config.data.k_core": {
            "data": {
                "source": "csv",
                "interactions": {"path": str(log)},
                "k_core": 2,
                "accept": ("old_times",),
            }
        },
        "config.labels": {"objective": {}},
        "config.features.user.history.max_length": {
            "features": {
                "user": {"history": HISTORY | {"max_length": 5}},
                "item": {"item_id": {"type": "string", "embedding_size": 8}},
            }
        },
    }
    for field, sections in changes.items():
        with pytest.raises(ConfigError, match=field):
            folder.check_fits(path, config_of(log, **sections))


@pytest.mark.parametrize("name", ["log.csv", "log.csv/below/it"])
def test_a_file_in_the_place_of_a_folder_is_refused_in_words(tmp_path, name):
    (tmp_path / "log.csv").write_text("user,item\n")
    with pytest.raises(
        ConfigError, match=r"--data=.*log.csv.*: .*log.csv is a file. Name a folder"
    ):
        local_folder(tmp_path / name, "--data")
    with pytest.raises(ConfigError, match=r"--workdir=.*is a file"):
        local_folder(tmp_path / name)
    assert local_folder(tmp_path / "new" / "one") == tmp_path / "new" / "one"
