"""A run taken over to grown data: nothing known is forgotten, new rows begin where they were told
to, training goes on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.csv
import pytest

from tests.features.history_encoder import history_encoder
from tests.training.shop import small_config
from twotower.core.errors import CheckpointError, ConfigError
from twotower.core.mesh import make_mesh
from twotower.data.shop.generate import generate
from twotower.training import grow as grow_module
from twotower.training import run
from twotower.training.candidates import corpus_size
from twotower.training.grow import grow
from twotower.training.init import abstract_state
from twotower.training.loop import open_checkpoints
from twotower.training.state import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A shop's log and its items, as files: the first part knows fewer users and items than the
    whole."""
    folder = tmp_path_factory.mktemp("log")
    shop = generate(3000, seed=0)
    rows = shop.interactions.select(["user_id", "item_id", "timestamp"])
    for name, part in {"old": rows.slice(0, 1200), "new": rows}.items():
        pyarrow.csv.write_csv(part, folder / f"{name}.csv")
    pyarrow.csv.write_csv(shop.items.select(["item_id", "title", "price"]), folder / "items.csv")
    return folder


def _config(log, name, **training):
    return small_config(
        data={
            "source": "csv",
            "interactions": {"path": str(log / f"{name}.csv"), "timestamp_format": ""},
            "item_table": {"path": str(log / "items.csv")},
        },
        features={
            "user": {"user_id": {"type": "string", "embedding_size": 16}},
            "item": {
                "item_id": {"type": "string", "embedding_size": 16},
                "price": {"type": "float"},
                "title": {"type": "text", "embedding_size": 8, "buckets": 500},
            },
        },
        training={"tables": {"kind": "lazy_adam", "learning_rate": 0.01}} | training,
    )


@pytest.fixture(scope="module")
def old(log, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("old") / "run"
    run.train(_config(log, "old"), workdir, devices=1)
    return workdir


@functools.cache
def _state(workdir, step):
    loaded = run.load_run(workdir, checkpoint=str(step))
    trainer = Trainer.build(loaded.config, loaded.model, corpus_size(loaded.prepared))
    with open_checkpoints(workdir, loaded.config, read_only=True) as checkpoints:
        return loaded, checkpoints.restore(step, abstract_state(trainer, make_mesh(1)))[0]


@pytest.fixture(scope="module", params=["oov", "mean"])
def grown(request, log, old, tmp_path_factory):
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    grow(_config(log, "new", steps=20), old, workdir, new_rows=request.param)
    return request.param, workdir


def test_rows_from_content_need_other_features(log, old, tmp_path):
    with pytest.raises(
        ConfigError,
        match="users by their features other than 'user_id', and there are none: choose oov",
    ):
        grow(_config(log, "new", steps=20), old, tmp_path / "run", new_rows="content")


def test_scores_of_known_pairs_are_the_same_bits(old, grown):
    before, _ = _state(old, 12)
    after, _ = _state(grown[1], 12)
    tables = {"user": before.prepared.users, "item": before.prepared.items}
    scores = []
    for side, table in tables.items():
        vocabulary = before.prepared.encoder.fitted[side, f"{side}_id"].vocabulary
        tables[side] = table.filter(vocabulary.rows(table[f"{side}_id"]) >= vocabulary.first)
        assert len(tables[side]) > 20
    for loaded in (before, after):
        encoder = loaded.prepared.encoder
        features = {
            side: jax.tree.map(jnp.asarray, encoder.encode(side, tables[side])) for side in tables
        }
        embed = jax.jit(loaded.model.embed, static_argnums=0)
        vectors = {side: np.asarray(embed(side, loaded.weights, features[side])) for side in tables}
        scores.append(vectors["user"] @ vectors["item"].T)
    np.testing.assert_array_equal(*scores)
    assert (
        after.prepared.encoder.tables["user.user_id"].rows
        > before.prepared.encoder.tables["user.user_id"].rows
    )


def test_known_rows_and_slots_are_taken_over_and_new_slots_are_fresh(old, grown):
    before, state = _state(old, 12)
    after, new = _state(grown[1], 12)
    assert int(new.step) == 12
    for name, shape in before.prepared.encoder.tables.items():
        rows = slice(0, shape.rows)
        np.testing.assert_array_equal(new.tables[name][rows], state.tables[name][rows])
        for part, slot in state.table_slots[name].items():
            np.testing.assert_array_equal(new.table_slots[name][part][rows], slot[rows])
            assert not np.any(new.table_slots[name][part][shape.rows :])
            assert np.any(slot[rows])
    jax.tree.map(
        np.testing.assert_array_equal, (new.params, new.opt_state), (state.params, state.opt_state)
    )
    np.testing.assert_array_equal(new.frequency["item"]["rows"], len(after.prepared.train))


def test_new_rows_begin_where_they_were_told_to(old, grown):
    how, workdir = grown
    before, state = _state(old, 12)
    after, new = _state(workdir, 12)
    vocabularies = [
        x.prepared.encoder.fitted["user", "user_id"].vocabulary for x in (before, after)
    ]
    added = vocabularies[1].values[len(vocabularies[0].values) :]
    assert len(added) > 5
    rows = np.asarray(new.tables["user.user_id"])[vocabularies[1].rows(added)]
    table = np.asarray(state.tables["user.user_id"])
    if how == "oov":
        np.testing.assert_array_equal(rows, table[vocabularies[0].rows(added)])
    else:
        known = table[vocabularies[0].first : vocabularies[0].size]
        np.testing.assert_allclose(rows, np.broadcast_to(known.mean(0), rows.shape), rtol=1e-6)


def test_training_goes_on(log, grown):
    workdir = grown[1]
    run.train(_config(log, "new", steps=20), workdir, devices=1)
    assert run.load_run(workdir, checkpoint="latest").step == 20


def test_rows_from_content_are_means_of_the_most_alike(log, old, tmp_path):
    """Items alone have other features; the new item that is a copy of a known one begins as its
    neighbours' mean."""
    from twotower.features.fit import extend_encoder
    from twotower.training import grow as module

    loaded, state = _state(old, 12)
    encoder = loaded.prepared.encoder
    config = _config(log, "new", steps=20)
    prepared = module.prepare(config, fit=functools.partial(extend_encoder, encoder))
    name = "item.item_id"
    added = range(encoder.tables[name].rows, prepared.encoder.tables[name].rows)
    addition = module.Addition(name, "item", "item_id", added)
    rows = module.NEW_ROWS["content"](module.OldRun(state, encoder), prepared, addition)
    content = module.content_vectors(
        {n: i for n, i in encoder.inputs["item"].items() if n != "item_id"},
        state.tables,
        prepared.features["item"],
    )
    ids = prepared.features["item"]["item_id"]
    known = np.flatnonzero(
        (ids < added.start) & (ids >= encoder.fitted["item", "item_id"].vocabulary.first)
    )
    for row, place in zip(rows, (int(np.flatnonzero(ids == i)[0]) for i in added)):
        nearest = known[
            np.argsort(-(content[known] @ content[place]), kind="stable")[: module.NEIGHBOURS]
        ]
        np.testing.assert_allclose(
            row, np.asarray(state.tables[name])[ids[nearest]].mean(0), atol=1e-5
        )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model": {"user": {"layers": (8,)}, "item": {"layers": (8,)}}}, "config.model differs"),
        (
            {"training": {"tables": {"kind": "sgd"}, "steps": 20}},
            "config.training.tables.kind differs",
        ),
        (
            {"training": {"tables": {"kind": "lazy_adam"}}},
            "config.training.steps=12 counts from the beginning.*step 12",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(log, old, tmp_path, change, message):
    config = _config(log, "new")
    values = dataclasses.asdict(config)
    for section, fields in change.items():
        values[section] |= fields
    from twotower.config import from_dict

    with pytest.raises(ConfigError, match=message):
        grow(from_dict(values), old, tmp_path / "run", new_rows="oov")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_and_a_step_that_is_not_there_are_refused(log, old, tmp_path):
    with pytest.raises(ConfigError, match="must be a new or empty folder"):
        grow(_config(log, "new", steps=20), old, old, new_rows="oov")
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        grow(_config(log, "new", steps=20), old, tmp_path / "run", new_rows="oov", checkpoint="5")
    with pytest.raises(ConfigError, match="--new_rows='men' is not known; did you mean 'mean'"):
        grow(_config(log, "new", steps=20), old, tmp_path / "run", new_rows="men")


def test_new_rows_of_a_table_that_histories_read_are_those_of_its_items():
    uses = grow_module._vocabulary_uses(history_encoder(reads=["item_id", "kind"]))
    assert uses == {"item.item_id": ("item", "item_id"), "item.kind": ("item", "kind")}
