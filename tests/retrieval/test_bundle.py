"""The bundle: whole, unchanged, of one piece, and scoring as the trainer does."""

import dataclasses
import datetime
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.retrieval.runs import make_run, rewrite_manifest, with_other_weights, write
from twotower import plugins
from twotower.config import RerankConfig, from_dict
from twotower.core import files
from twotower.core.errors import BundleError, ConfigError
from twotower.core.files import LOCK, current_version
from twotower.core.kinds import importing, read_record
from twotower.evaluation.intervals import LEVEL
from twotower.objectives.losses import LOSSES
from twotower.pipeline.prepare import prepare
from twotower.retrieval import embed as embed_module
from twotower.retrieval import export as export_module
from twotower.retrieval.batch.jobs import recommend_all
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.export import (
    all_rows,
    check_parity,
    compare_scores,
    display_items,
    export,
    known_users,
    make_bundle,
)
from twotower.retrieval.rerank import RERANKERS
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.tower_programs import load_weights, model_version, save_weights
from twotower.retrieval.user_items import items_of_users, latest_rows
from twotower.towers.two_tower import Weights

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(exported_files, tmp_path):
    """A bundle that a test may spoil, as an older twotower would have written it: without
    versions."""
    shutil.copytree(exported_files, tmp_path / "bundle")
    return tmp_path / "bundle"


def vectors(run, side, features):
    """As the trainer computes them."""
    return np.asarray(run.model.embed(side, run.weights, jax.tree.map(jnp.asarray, dict(features))))


def test_the_manifest_says_what_the_model_saw_and_whom_it_knows(run, tmp_path):
    figures = {
        "run": "my shop",
        "figures": {"validation": {"ndcg@10": 0.25}, "test": {"recall@10": 0.125}},
        "intervals": {"test": {"recall@10": [0.1, 0.1625]}},
    }
    bundle = export(run, tmp_path / "bundle", figures=figures)
    manifest = load_bundle(bundle.folder).manifest
    assert manifest["figures"] == figures["figures"]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(manifest["date"])
    assert abs(age) < datetime.timedelta(minutes=10)
    prepared = run.prepared
    parts = {name: getattr(prepared, name) for name in ("train", "validation", "test")}
    assert manifest["data"]["rows"] == {name: len(rows) for name, rows in parts.items()}
    for name, rows in parts.items():
        for bound, seconds in (("from", rows.timestamp.min()), ("to", rows.timestamp.max())):
            moment = datetime.datetime.fromisoformat(manifest["data"][name][bound])
            assert moment.timestamp() == seconds
    assert manifest["personal"] == {
        "encoder": ["user_id"],
        "golden.json": ["user_id"],
        "users.parquet": ["user_id", "city", "event"],
        "user_vectors.npy": ["user_id"],
        "seen_items.npy": ["item_id"],
        "seen_events.arrow": ["timestamp", "event"],
    }
    files_of_bundle = current_version(bundle.folder)
    card = (files_of_bundle / "README.md").read_text(encoding="utf-8")
    assert f"{manifest['num_items']:,} items" in card and "0.2500" in card
    assert f"- train: {len(prepared.train):,} rows, {manifest['data']['train']['from']}" in card
    assert "- users.parquet: user_id, city, event" in card
    # What was measured with its interval, and the commands without the folder of anybody.
    assert re.search(r"test +recall@10 +0.1250 +0.1000 to 0.1625\n", card)
    assert re.search(r"validation +ndcg@10 +0.2500 +-\n", card)
    assert f"value  {LEVEL:.0%} interval\n" in card
    assert "twotower train --workdir='runs/my shop'\n" in card
    assert f"twotower export --workdir='runs/my shop' --checkpoint={run.step}\n" in card
    assert str(run.workdir) not in card and str(tmp_path) not in card
    assert manifest["files"]["README.md"] == files.digest(files_of_bundle / "README.md")


def test_a_bundle_without_users_answers_all_as_strangers(run, exported, tmp_path):
    export(run, tmp_path / "bundle", with_users=False)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest["personal"] == {"encoder": ["user_id"]}
    assert bundle.manifest["num_users"] == len(bundle.users) == len(bundle.user_vectors) == 0
    np.testing.assert_array_equal(bundle.vectors, load_bundle(exported).vectors)
    without = Retriever.load(tmp_path / "bundle")
    known = run.prepared.users["user_id"][0].as_py()
    scores = [item.score for item in without.recommend(known, k=5)]
    stranger = Retriever.load(exported).encode_users([{"user_id": known}])
    whole = np.sort(stranger @ np.asarray(bundle.vectors).T)[0, ::-1]
    np.testing.assert_allclose(scores, whole[:5], rtol=1e-5)
    # Its items change as those of any bundle.
    without.upsert([{"item_id": "new", "price": 3.0}])
    without.compact()
    assert "new" in load_bundle(tmp_path / "bundle").items["item_id"].to_pylist()
    with pytest.raises(ConfigError, match="without its users"):
        recommend_all(tmp_path / "bundle", tmp_path / "lists", 3)


def test_what_is_written_is_what_is_read(run, exported):
    bundle = load_bundle(exported)
    assert bundle.config == run.config and bundle.manifest["step"] == 7
    assert bundle.manifest["metric"] == "dot" and bundle.manifest["normalized"] is True
    assert bundle.manifest["index"] == {"kind": bundle.index.kind}
    assert bundle.items["item_id"].to_pylist() == run.prepared.items["item_id"].to_pylist()
    for ours, theirs in zip(
        jax.tree.leaves(bundle.towers.weights), jax.tree.leaves(run.weights._asdict()), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert jax.tree.structure(bundle.towers.weights) == jax.tree.structure(run.weights._asdict())
    # On the device, so that answering does not carry the tables there each time.
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(bundle.towers.load().arrays))
    assert isinstance(bundle.vectors.base, np.memmap) and isinstance(
        bundle.user_vectors.base, np.memmap
    )


def test_scores_equal_the_trainers(run, exported):
    retriever = Retriever.load(exported)
    prepared = run.prepared
    # The context of a known user is that of its latest row.
    joined = np.concatenate([part.context["event"] for part in all_rows(prepared)])
    latest = latest_rows(all_rows(prepared), num_users=len(prepared.users))
    rows = np.flatnonzero(latest >= 0)
    features = {name: x[rows] for name, x in prepared.features["user"].items()} | {
        "event": joined[latest[rows]]
    }
    trained = vectors(run, "user", features) @ vectors(run, "item", prepared.features["item"]).T
    ids = prepared.users["user_id"].take(rows).to_pylist()
    served = retriever.recommend_many(ids, k=len(prepared.items), exclude_seen=False)
    position = {item: n for n, item in enumerate(prepared.items["item_id"].to_pylist())}
    items = np.array([position[i] for i in served["item_id"].to_pylist()]).reshape(len(ids), -1)
    scores = served["score"].to_numpy().reshape(items.shape)
    np.testing.assert_allclose(
        scores, np.take_along_axis(np.asarray(trained), items, axis=1), atol=1e-5
    )


def test_no_file_is_a_pickle(exported):
    paths = list(exported.rglob("*.np[yz]"))
    assert paths
    for path in paths:
        loaded = np.load(path, allow_pickle=False)
        assert all(loaded[name] is not None for name in getattr(loaded, "files", []))
    assert not list(exported.rglob("*.pkl"))


def test_any_changed_byte_is_refused_by_name(copy):
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        original = path.read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=path.name.replace(".", r"\.")):
            load_bundle(copy)
        path.write_bytes(original)
    load_bundle(copy)


def test_a_missing_file_is_refused_by_name(copy):
    (copy / "item_vectors.npy").unlink()
    with pytest.raises(BundleError, match="item_vectors.npy is missing"):
        load_bundle(copy)


def test_without_its_index_a_bundle_answers_by_exact_search_and_says_so(exported, copy, caplog):
    whole = Retriever.load(exported)
    shutil.rmtree(copy / "index")
    with caplog.at_level("WARNING", logger="absl"):
        without = Retriever.load(copy)
    assert len(caplog.records) == 1 and "the search is exact" in caplog.text
    user = whole.bundle.users["user_id"][0].as_py()
    assert without.recommend(user, k=5) == whole.recommend(user, k=5)
    # An index that is there must be the one that was written.
    (copy / "index").mkdir()
    (copy / "index" / "index.json").write_text("{}")
    with pytest.raises(BundleError, match="index.json is corrupt"):
        load_bundle(copy)


def test_no_bundle_and_a_foreign_folder(tmp_path):
    with pytest.raises(BundleError, match="python -m experiments.export --workdir="):
        load_bundle(tmp_path / "bundle")
    (tmp_path / "manifest.json").write_text('{"format": "something"}')
    with pytest.raises(BundleError, match="not the manifest of a twotower bundle"):
        load_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text("no json")
    with pytest.raises(BundleError, match="not JSON"):
        load_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "twotower-bundle", "format_version": 99}')
    with pytest.raises(BundleError, match="format version 99"):
        load_bundle(tmp_path)


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """A bundle of the same data and other weights."""
    return current_version(write(with_other_weights(run, tmp_path_factory.mktemp("other"))))


def test_an_index_of_other_vectors_is_refused(copy, other):
    shutil.copy(other / "index" / "index.json", copy / "index" / "index.json")
    rewrite_manifest(copy)
    with pytest.raises(BundleError, match="built from other vectors"):
        load_bundle(copy)


def test_a_newer_user_tower_beside_older_items_is_refused(copy, other):
    shutil.copy(other / "params.npz", copy / "params.npz")
    shutil.rmtree(copy / "tables")
    shutil.copytree(other / "tables", copy / "tables")
    rewrite_manifest(copy)
    with pytest.raises(BundleError, match="weights of another model"):
        load_bundle(copy)
    rewrite_manifest(
        copy, model_version=json.loads((other / "manifest.json").read_text())["model_version"]
    )
    with pytest.raises(BundleError, match="but the user tower is of model"):
        load_bundle(copy)


def test_an_export_that_fails_leaves_the_old_bundle(run, copy, monkeypatch):

    def content():
        files = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        return {path: data for path, data in files.items() if path.name != LOCK}

    before = content()

    def spoil(folder):
        bundle = load_bundle(folder)
        vectors = np.array(bundle.vectors)
        vectors[0, 0] += 1e-3
        return dataclasses.replace(bundle, vectors=vectors)

    monkeypatch.setattr(export_module, "load_bundle", spoil)
    with pytest.raises(BundleError, match="scores differ from the trainer's by up to"):
        export(run, copy)
    assert content() == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_an_export_takes_the_place_of_the_old_bundle_and_of_what_a_killed_one_left(run, copy):
    """The first one of a bundle without versions, the second of one of them."""
    (copy / "left").write_text("of the old bundle")
    for names in (["current", "v-1"], ["current", "v-1", "v-3"]):
        export(run, copy)
        assert sorted(path.name for path in copy.iterdir()) == [LOCK, *names]
        assert [path.name for path in copy.parent.iterdir()] == ["bundle"]
        check_parity(run, copy)
        (copy / "v-2").mkdir(exist_ok=True)  # of an export that was killed


@pytest.mark.parametrize("step", ["write_bundle", "check_parity", "publish_with_changes"])
def test_an_export_that_is_killed_leaves_the_old_bundle(run, exported, tmp_path, monkeypatch, step):
    """Killed after each step, with nothing tidied up: the old bundle, or after the last the new."""
    folder = shutil.copytree(exported, tmp_path / "bundle")
    function = getattr(export_module, step)

    class Killed(BaseException):
        pass

    def killed(*args, **options):
        function(*args, **options)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(export_module, step, killed)
        patch.setattr(files, "discard", lambda path: None)
        export(dataclasses.replace(run, step=8), folder)
    assert load_bundle(folder).manifest["step"] == (8 if step == "publish_with_changes" else 7)


@pytest.mark.parametrize("content", ["v-2\n", "", None])
def test_a_pointer_that_is_damaged_is_refused_by_name(exported, tmp_path, content):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    (folder / "current").unlink()
    if content is not None:
        (folder / "current").write_text(content)
    with pytest.raises(BundleError, match="current.* Export again"):
        load_bundle(folder)


def test_parity_is_a_matter_of_1e_5():
    trained = np.array([[0.5, -0.25]], np.float32)
    compare_scores(trained + 9e-6, trained)
    for served in (trained + 2e-5, trained * np.nan):
        with pytest.raises(BundleError, match="nothing was exported"):
            compare_scores(served, trained)


def showing(run, *display):
    retrieval = dataclasses.replace(run.config.retrieval, display=display)
    config = dataclasses.replace(run.config, retrieval=retrieval)
    return dataclasses.replace(
        run, config=config, prepared=dataclasses.replace(run.prepared, config=config)
    )


def test_display_columns_are_chosen_and_checked(run, tmp_path):
    export(showing(run, "title", "price"), tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").items.column_names == [
        "item_id",
        "title",
        "price",
    ]
    with pytest.raises(ConfigError, match="did you mean 'title'"):  # already before training
        prepare(showing(run, "titel").config)


def test_raw_columns_of_users_are_kept_and_vectors_of_items_are_not(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text('item_id,vector,name\n1,"[1, 2]",lamp\n2,"[3, 4]",desk\n')
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,first,last\n" + "u,1,Ann,Lee\nv,2,Bo,\nu,2,Ann,Lee\n" * 3
    )
    config = from_dict(
        {
            "data": {
                "source": "csv",
                "interactions": {"path": str(tmp_path / "log.csv")},
                "user_table": {"path": str(tmp_path / "log.csv")},
                "item_table": {"path": str(path)},
            },
            "split": {"kind": "leave_last_out", "accept_leakage": ("repeated_pairs",)},
            "features": {
                "user": {"name": {"type": "text", "columns": ["first", "last"]}},
                "item": {"vector": {"type": "pretrained", "frozen": False}},
            },
        }
    )
    prepared = prepare(config)
    users = known_users(prepared)
    assert users.column_names == ["user_id", "first", "last"]
    encoder = prepared.encoder
    ours = encoder.encode("user", users)["name"]
    np.testing.assert_array_equal(ours, prepared.features["user"]["name"])
    assert display_items(prepared).column_names == ["item_id", "name"]
    assert encoder.tables["item.vector"].width == 2


def test_heads_and_the_bias_of_a_loss_are_saved_with_weights_but_stay_out_of_the_bundle(
    run, exported, tmp_path
):
    extra = {
        "heads": {"like": {"mlp": {"Dense_0": {"kernel": np.ones((16, 1), np.float32)}}}},
        "bias": np.float32(3),
    }
    weights = run.weights._replace(params=run.weights.params | extra)._asdict()
    save_weights(weights, tmp_path)
    assert jax.tree.structure(load_weights(tmp_path)) == jax.tree.structure(weights)
    assert (
        model_version(load_weights(tmp_path))
        == model_version(weights)
        != model_version(run.weights._asdict())
    )
    bundle = make_bundle(dataclasses.replace(run, weights=Weights(**weights)))
    assert model_version(bundle.towers.weights) == load_bundle(exported).manifest["model_version"]


def test_what_a_user_was_shown_and_did_not_want_is_not_seen(tmp_path):
    labelled = make_run(tmp_path / "run", objective={"label": "liked"})
    seen = make_bundle(labelled).seen
    parts = [getattr(labelled.prepared, name) for name in ("train", "validation", "test")]
    liked = [
        (user, item)
        for part in parts
        for user, item, x in zip(part.user, part.item, part.labels["liked"])
        if x == 1
    ]
    found = {(user, item) for user in range(len(seen)) for item in seen[user].tolist()}
    assert found == set(liked) and len(liked) < 0.4 * sum(map(len, parts))


def test_weights_with_odd_names_survive(run, tmp_path):
    weights = run.weights._replace(
        tables={"a/b.c%": np.ones((2, 3), np.float32)}, batch_stats={"user": {"x/y": np.zeros(1)}}
    )._asdict()
    save_weights(weights, tmp_path)
    loaded = load_weights(tmp_path)
    assert jax.tree.structure(loaded) == jax.tree.structure(weights)
    assert model_version(loaded) == model_version(weights) != model_version(run.weights._asdict())


def test_towers_without_parameters_survive(run, tmp_path):
    """Matrix factorisation: tables alone."""
    weights = run.weights._replace(
        params={"user": {}, "item": {"a": {}}, "log_temperature": np.float32(0)}, batch_stats={}
    )._asdict()
    save_weights(weights, tmp_path)
    assert jax.tree.structure(load_weights(tmp_path)) == jax.tree.structure(weights)
    assert model_version(load_weights(tmp_path)) == model_version(weights)


def test_the_version_tells_names_shapes_and_values_apart(run):
    one = run.weights._replace(tables={"a": np.zeros((2, 3), np.float32)})
    versions = {
        model_version(one._replace(tables={name: table})._asdict())
        for name, table in [
            ("a", one.tables["a"]),
            ("b", one.tables["a"]),
            ("a", np.zeros((3, 2), np.float32)),
            ("a", np.eye(2, 3, dtype=np.float32)),
        ]
    }
    assert len(versions) == 4


def test_embedding_in_batches_equals_embedding_at_once(run):
    features = run.prepared.features["item"]
    whole = vectors(run, "item", features)
    np.testing.assert_allclose(
        embed_rows(run.model, run.weights, "item", features, batch=16), whole, atol=1e-6
    )
    none = {name: values[:0] for name, values in features.items()}
    assert embed_rows(run.model, run.weights, "item", none).shape == (0, 16)


def test_embedding_shows_progress_by_batches(run, monkeypatch):
    shown = []
    show = embed_module.progress

    def record(blocks, **options):
        shown.append((options["what"], options["total"]))
        return show(blocks, **options)

    monkeypatch.setattr(embed_module, "progress", record)
    features = run.prepared.features["item"]
    embed_rows(run.model, run.weights, "item", features)
    embed_rows(run.model, run.weights, "item", features, batch=16)
    batches = -(-len(run.prepared.items) // 16)
    assert shown == [("Embedding items", 1), ("Embedding items", batches)]


def test_seen_items_are_all_rows_with_the_latest_last(run):
    prepared = run.prepared
    seen = items_of_users(all_rows(prepared), num_users=len(prepared.users))
    log = sorted(
        (
            (t, u, i)
            for part in all_rows(prepared)
            for t, u, i in zip(part.timestamp, part.user, part.item)
            if i >= 0
        ),
        key=lambda row: row[0],
    )
    expected = [[] for _ in range(len(prepared.users))]
    for _, user, item in log:
        if item in expected[user]:
            expected[user].remove(item)
        expected[user].append(item)
    assert [row.tolist() for row in seen] == expected


def test_a_bundle_of_own_parts_answers_without_their_module(run, tmp_path, monkeypatch):
    name = "parts_of_a_test.py"
    plugin = plugins.Plugin(tmp_path / name, "0" * 64)
    monkeypatch.setitem(plugins._imported, name, plugin)
    with importing(name):
        LOSSES["of_a_test"] = LOSSES["bpr"]
        RERANKERS["of_a_test"] = lambda candidates, k: np.arange(k)[::-1]
    config = dataclasses.replace(
        run.config,
        plugins=(name,),
        objective=dataclasses.replace(run.config.objective, loss="of_a_test"),
        retrieval=dataclasses.replace(run.config.retrieval, rerank=RerankConfig(kind="of_a_test")),
    )
    folder = write(dataclasses.replace(run, config=config, workdir=tmp_path))
    del LOSSES["of_a_test"], RERANKERS["of_a_test"], plugins._imported[name]
    assert str(tmp_path) not in (current_version(folder) / "plugins.json").read_text()
    retriever = Retriever.load(folder)
    user = retriever.bundle.users["user_id"][0].as_py()
    best = [item.item_id for item in retriever.recommend(user, k=3, rerank="")]
    assert len(retriever.similar_items(best[0], k=3)) == 3
    with pytest.raises(ConfigError, match=f"'of_a_test' was registered by '{name}'"):
        retriever.recommend(user, k=3)
    # Another version of the bundle, by a process that has never seen the module.
    retriever.delete([best[0]])
    retriever.compact()
    with pytest.raises(ConfigError, match=f"'of_a_test' was registered by '{name}'"):
        Retriever.load(folder).recommend(user, k=3)
    kinds = read_record(current_version(folder))["kinds"]
    assert kinds["loss"] == {"of_a_test": name}
