"""A loss, a tower, a feature type, a source and a re-ranker from a file outside of the package:
trained by one process, and exported, measured, grown and asked by another."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.features.encoder_shop import fitted
from twotower.config import ModelConfig, TowerConfig
from twotower.core.errors import ConfigError
from twotower.core.kinds import REGISTRIES
from twotower.retrieval.rerank import Candidates
from twotower.retrieval.retriever import Retriever
from twotower.towers.two_tower import TwoTower
from twotower.training.run import load_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "experiments" / "examples" / "own_parts"
SMALL = {
    "training.batch_size": 128,
    "training.steps": 2,
    "training.validate_every": 2,
    "training.metric": "recall@5",
    "evaluation.ks": (5,),
}
# Everything that a user does with a trained run, told by what came of it.
AFTERWARDS = """
import json
import twotower as tt
from twotower.experiment import load_config
from twotower.training.grow import grow

grow(load_config("mine/experiment.py", **{small!r}), "run", "grown", new_rows="oov")
run = tt.load_run("run")
run.export()
found = {{"recall": run.evaluate(ks=(5,))["model"]["recall@5"]}}

def categories(folder, **options):
    items = tt.load_retriever(folder).recommend("u7", k=9, **options)
    return [item.display["category"] for item in items]

for folder in ("run", "run/checkpoints/2", "grown"):
    found[folder] = categories(folder)
options = {{"column": "category", "value": "lamps", "weight": 9.0}}
found["lifted"] = categories("run", rerank={{"kind": "boost", "multiple": 20, "options": options}})
tower = run.model.towers["item"]
found["tower"] = [type(tower).__name__, tower.options.depth]
print(json.dumps(found))
"""


def python(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def parts(own_kinds):
    """The names of the example's module."""
    return runpy.run_path(str(EXAMPLE / "parts.py"))


@pytest.mark.slow
def test_the_tower_is_its_formula(parts):
    encoder = fitted({"item": {"item_id": {"type": "string", "embedding_size": 4}}})
    tower = TowerConfig(kind="cross", options={"depth": 2}, layers=(3,))
    user = TowerConfig(layers=(3,))
    model = TwoTower.build(ModelConfig(item=tower, user=user, normalize=False), encoder)
    weights = model.init(jax.random.key(0))
    ids = np.array([3, 5], np.int32)
    features = {"item_id": jnp.asarray(ids)}
    found = model.embed("item", weights, features)
    params = jax.tree.map(np.asarray, weights.params["item"])
    first = np.asarray(weights.tables["item.item_id"])[ids]
    x = first
    for layer in (params["cross_0"], params["cross_1"]):
        x = first * (x @ layer["kernel"] + layer["bias"]) + x
    expected = x @ params["project"]["kernel"] + params["project"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_its_formula_and_nothing_without_negatives(parts):
    options = parts["PolyOptions"](epsilon=0.5)
    where = jnp.array([[True, True, False], [False, False, False]])
    negatives = jnp.array([[0.0, 1.0, 9.0], [1.0, 1.0, 1.0]])
    found = parts["poly"](jnp.array([0.5, 0.5]), negatives, where=where, options=options)
    share = math.exp(0.5) / (math.exp(0.5) + math.exp(0.0) + math.exp(1.0))
    np.testing.assert_allclose(found, [-math.log(share) + 0.5 * (1 - share), 0.0], rtol=1e-6)


def test_the_reranker_lifts_what_it_is_told_to(parts):
    rows = [{"category": name} for name in ("a", "b", "a", "b")]
    candidates = Candidates(np.array([0.9, 0.8, 0.7, 0.6]), np.eye(4), lambda: rows)
    options = parts["BoostOptions"](column="category", value="b", weight=0.25)
    assert parts["boost"](candidates, 3, options=options).tolist() == [1, 0, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: the example's files, and a run of them."""
    folder = tmp_path_factory.mktemp("own_parts")
    shutil.copytree(EXAMPLE, folder / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    writer = runpy.run_path(str(folder / "mine" / "write_log.py"))
    writer["write_log"](str(folder / "shop.db"))
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    config = "--config=mine/experiment.py"
    python(folder, "-m", "twotower", "train", config, "--workdir=run", *flags)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    script = AFTERWARDS.format(small=SMALL | {"training.steps": 4})
    return json.loads(python(folder, "-c", script).splitlines()[-1])


@pytest.mark.slow
def test_own_parts_are_known_in_other_processes(found):
    assert 0 < found["recall"] <= 1
    assert found["tower"] == ["CrossTower", 1]
    for folder in ("run", "run/checkpoints/2", "grown"):
        assert len(found[folder]) == 9
    assert set(found["lifted"]) == {"lamps"}


@pytest.mark.slow
@pytest.mark.usefixtures("found")
def test_a_bundle_holds_no_code_and_tells_which_module_it_needs(folder):
    assert not list((folder / "run" / "bundle").rglob("*.py"))
    with pytest.raises(ConfigError, match="'num_words' was registered by 'mine/parts.py'"):
        Retriever.load(folder / "run" / "bundle")


@pytest.mark.slow
def test_a_missing_module_is_told_with_what_it_had(folder, monkeypatch):
    monkeypatch.chdir(folder)
    parts = folder / "mine" / "parts.py"
    parts.rename(folder / "elsewhere.py")
    with pytest.raises(ConfigError) as error:
        load_config("run")
    (folder / "elsewhere.py").rename(parts)
    for words in ("no file 'mine/parts.py'", "the loss 'poly'", "the tower 'cross'", str(parts)):
        assert words in str(error.value)
    assert not any(kinds.origins for kinds in REGISTRIES)
