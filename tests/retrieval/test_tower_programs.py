"""Towers as programs: the trainer's vectors without the trainer's code."""

import json
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from tests.retrieval.runs import make_run, rewrite_manifest
from twotower.core.errors import BundleError
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.export import known_users, make_tower_programs
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.tower_programs import PLATFORMS, TowerPrograms

pytestmark = pytest.mark.slow

EVERY_KIND = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 8},
        "event": {"type": "string", "embedding_size": 3},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 8},
        "title": {"type": "text", "embedding_size": 4},
        "price": {"type": "float"},
        "category": {"type": "strings", "separator": "|", "embedding_size": 4},
    },
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    layers = {"layers": (8,), "layer_norm": True}
    run = make_run(
        tmp_path_factory.mktemp("kinds"),
        features=EVERY_KIND,
        model={"user": layers, "item": layers},
    )
    return run, make_tower_programs(run, known_users(run.prepared))


def test_programs_give_the_trainers_vectors_at_any_batch_size(towers):
    """Ids, lists of ids and numbers; one compiled program would not do for all sizes."""
    run, served = towers
    features = run.prepared.features["item"]
    trained = embed_rows(run.model, run.weights, "item", features)
    for rows, batch in ((slice(0, 1), 64), (slice(3, 50), 64), (slice(0, 130), 32)):
        part = {name: x[rows] for name, x in features.items()}
        np.testing.assert_allclose(
            served.embed("item", part, batch=batch), trained[rows], atol=1e-6
        )
    assert served.embed("item", {name: x[:0] for name, x in features.items()}).shape == (0, 8)


def test_other_weights_are_answered_by_the_program_that_is_there(towers, caplog):
    """A new version of a bundle: nothing is compiled again, and the vectors are its own."""
    run, served = towers
    features = {name: x[:2] for name, x in run.prepared.features["item"].items()}
    before = served.embed("item", features)
    weights = jax.tree.map(lambda x: x + 1, served.weights)
    with jax.log_compiles(True):
        after = TowerPrograms(dict(served.programs), weights).embed("item", features)
    assert "Compiling" not in caplog.text and np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(served.embed("item", features), before)


def test_programs_are_small_and_for_every_platform(towers):
    _, served = towers
    for program in served.programs.values():
        exported = jax.export.deserialize(bytearray(program))
        assert exported.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
        assert str(exported.out_avals[0].shape) == "(b, 8)" and len(program) < 50_000


WITHOUT_FLAX = """if True:
    import json, sys
    class Blocked:
        def find_spec(self, name, *_):
            ours = ("twotower.towers.two_tower", "twotower.towers.tower", "twotower.towers.layers")
            if name.split(".")[0] in ("flax", "optax", "orbax") or name in ours:
                raise ModuleNotFoundError(f"{name} is not needed to serve")
    sys.meta_path.insert(0, Blocked())
    from twotower.retrieval.retriever import Retriever
    retriever = Retriever.load(sys.argv[1])
    retriever.upsert([{"item_id": "new", "price": 2.0}])
    user = retriever.bundle.users["user_id"][0].as_py()
    row = {"user_id": "new", "city": "x"}
    lists = [retriever.recommend(user, k=5), retriever.recommend(rows=[row], k=5)]
    print(json.dumps([[item.item_id for item in found] for found in lists]))
"""


def test_a_server_needs_neither_flax_nor_the_models_code(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLAX, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    retriever = Retriever.load(folder)  # with the change that the other process made
    user = retriever.bundle.users["user_id"][0].as_py()
    lists = [
        retriever.recommend(user, k=5),
        retriever.recommend(rows=[{"user_id": "new", "city": "x"}], k=5),
    ]
    assert json.loads(done.stdout) == [[item.item_id for item in found] for found in lists]


def test_a_program_that_cannot_be_read_is_refused(exported_files, tmp_path):
    folder = shutil.copytree(exported_files, tmp_path / "bundle")
    (folder / "user_tower.stablehlo").write_bytes(b"not a program" * 9)
    rewrite_manifest(folder)
    with pytest.raises(BundleError, match=r"stablehlo\) cannot be read"):
        load_bundle(folder)
    # Known users have stored vectors: where the towers are left alone, they are answered.
    retriever = Retriever.load(folder, load_towers=False)
    user = retriever.bundle.users["user_id"][0].as_py()
    assert len(retriever.recommend(user, k=5)) == 5
    with pytest.raises(BundleError, match=r"stablehlo\) cannot be read"):
        retriever.recommend("nobody", k=5)


def test_halves_of_different_lengths_and_widths_are_refused(exported_files, tmp_path):
    for n, (name, change, message) in enumerate(
        (
            ("item_counts", lambda x: x[:-1], "item_counts.npy differ in length"),
            ("user_vectors", lambda x: x[:-1], "users.parquet differs in length from its vectors"),
            ("user_vectors", lambda x: x[:, :-1], "differ in width"),
        )
    ):
        folder = shutil.copytree(exported_files, tmp_path / f"bundle{n}")
        np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))
        rewrite_manifest(folder)
        with pytest.raises(BundleError, match=message):
            load_bundle(folder)


def test_stored_users_are_answered_as_encoded_ones(retriever):
    users = retriever.bundle.users["user_id"].to_pylist()
    encoded = retriever.encode_users(retriever.user_rows.take(users))
    np.testing.assert_allclose(retriever.bundle.user_vectors, encoded, atol=1e-6)
    assert retriever._vectors_and_rows([users[4], "nobody", users[0]])[1].tolist() == [4, -1, 0]
    np.testing.assert_allclose(
        retriever._vectors_and_rows([users[4], "nobody"])[0][0], encoded[4], atol=1e-6
    )
