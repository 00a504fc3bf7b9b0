"""Every option is set by a shipped configuration, and every recipe trains and can be measured."""

import dataclasses
import importlib
import json
import math
import re
import shutil
from collections import ChainMap
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.extras import extra
from twotower import api
from twotower.config import defaults, from_dict
from twotower.experiment import read
from twotower.pipeline.prepare import prepare
from twotower.retrieval.mining import make_miner
from twotower.training.run import train

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "configs"
OWN_PARTS = "parts of one's own: experiments/examples/own_parts sets it"
# Options of services and machines, which no file of this project can show at work, and why.
ELSEWHERE = {
    "data.data_dir": "the folder of TFDS on this machine",
    "data.project": "BigQuery: a project that pays",
    "data.location": "BigQuery: a region",
    "data.TABLE.query": "BigQuery: SQL in the place of a path",
    "model.user.kind": OWN_PARTS,
    "model.item.kind": OWN_PARTS,
    "data.options": OWN_PARTS,
    "objective.options": OWN_PARTS,
    "model.user.options": OWN_PARTS,
    "model.item.options": OWN_PARTS,
    "plugins": OWN_PARTS,
}
# Mappings that are values themselves.
OPEN_ENDED = ("features.user", "features.item", "objective.heads", "data.event_weights")


def modules(folder):
    package = ".".join(folder.relative_to(ROOT).parts)
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


RECIPES = modules(CONFIGS / "recipes")
VARIANTS = [(name, recipe) for name, module in RECIPES.items() for recipe in module.RECIPES]


def leaves(values, prefix=""):
    """Yields the dotted name and the value of each option."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        section = hasattr(value, "items") and not path.endswith(("columns", "options"))
        if section and path not in OPEN_ENDED:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def option_of(path):
    """The name of an option, which is one for all tables of the data."""
    return re.sub(r"^data\.(interactions|\w+_table|validation|test)\.", "data.TABLE.", path)


def shipped():
    """Yields every shipped configuration."""
    for module in modules(CONFIGS).values():
        yield module.get_config()
    for name, recipe in VARIANTS:
        yield RECIPES[name].get_config(recipe)


def test_every_option_is_set_by_a_shipped_configuration():
    untouched = {option_of(path): value for path, value in leaves(defaults())}
    for config in shipped():
        for path, value in leaves(config):
            name = option_of(path)
            if name in untouched and value != untouched[name]:
                del untouched[name]
    assert untouched.keys() == ELSEWHERE.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_to_run_it(name):
    text = RECIPES[name].__doc__
    for command in ("train --config=experiments/configs/recipes/" + name, "export", "evaluate"):
        assert f"python -m experiments.{command}" in text


# What is embedded, where a recipe is about something else: each table costs tracing and compiling.
TINY_FEATURES = {
    "user": {"city": {"type": "string", "embedding_size": 8}},
    "item": {"item_id": {"type": "string", "embedding_size": 8}},
}
ABOUT_FEATURES = ("features", "tables", "shop")
# Of these the first of a group is the configuration that the others change.
BASES = ("features", "tables")


def config_of(group):
    """The configuration of a recipe, or of several that change different parts of the step."""
    (name, recipe), *others = group
    if not others:
        return RECIPES[name].get_config(recipe)
    if name not in BASES:
        others = group
    changes = [RECIPES[name].RECIPES[recipe] for name, recipe in others]
    names = [name for change in changes for name in change]
    assert len(names) == len(set(names))
    if name not in BASES:
        return read("recipes/shop", dict(ChainMap(*changes)))
    config = RECIPES[name].get_config(recipe)
    config.update_from_flattened_dict(dict(ChainMap(*changes)))
    return config


def shrunk(*group):
    """The configuration of recipes with a training of a few steps, and its shapes as small as
    they may be."""
    config = config_of(group)
    names = {name for name, _ in group}
    whole = names & {*ABOUT_FEATURES} or {("towers", "summed"), *EXPORTED} & {*group}
    if not whole:
        history = {"history": config.features.user.history} if "histories" in names else {}
        config.features.user = TINY_FEATURES["user"] | history
        config.features.item = TINY_FEATURES["item"]
    data = config.data
    data.num_interactions = min(data.num_interactions, 1000)
    training = config.training
    training.passes = 0.0
    training.steps = 4
    training.validate_every = 4
    training.log_every = 2
    negatives = config.objective.negatives
    training.batch_size = 64
    for source in ("uniform", "popularity"):
        negatives[source] = min(negatives[source], 32)
    negatives.queue = 128 if negatives.queue else 0
    negatives.queue_warmup = min(negatives.queue_warmup, 1)
    negatives.mined_refresh = 2
    negatives.mined_ranks = (20, 50)
    return config


def no_validation(*_):
    """A validation that compiles nothing: what a recipe changes is in its step."""
    return lambda weights: {"recall@10": 0.5}


# Recipes whose options are seen in measuring or exporting; the others change the step alone.
MEASURED = [("shop", "plain"), ("heads", "retrieval_and_two_heads"), ("vectors", "cut_int8")]
# Of the run of shop-plain: what they change is in the export alone.
EXPORTED = [("vectors", recipe) for recipe in RECIPES["vectors"].RECIPES if recipe != "cut_int8"]
# Trained together: they change different parts of one step, and most of the time is its tracing.
TOGETHER = """
    losses-softmax_uncorrected histories-attention_bag negatives-explicit
    losses-softmax_with_margin histories-rotary negatives-frequency_by_gaps
    losses-softmax_own_items_as_negatives histories-gru negatives-frequency_by_sketch
    losses-softmax_symmetric histories-bidirectional
    losses-softmax_pallas towers-deep optimizers-adagrad
    losses-corrected_softmax towers-batch_norm optimizers-plateau
    losses-bsl towers-dropout_by_layer optimizers-streamed
    losses-gbce towers-summed optimizers-host
    losses-sigmoid towers-bfloat16
    tables-dates losses-bpr negatives-uniform
    features-own_tables losses-hinge negatives-popularity
    losses-triplet negatives-queue
    tables-random_split losses-cosine_contrastive negatives-mined
    negatives-full_softmax optimizers-adamw
"""
GROUPS = [
    [tuple(name.split("-")) for name in line.split()]
    for line in TOGETHER.split("\n")
    if line.strip()
]
# Read the same rows as another recipe, which is trained: of it, their times are text.
SAME_ROWS = [
    (("features", "times_in_ms"), ("features", "own_tables")),
    (("tables", "numbers"), ("tables", "dates")),
]
OTHERS = {*MEASURED, *EXPORTED}
OTHERS |= {pair for pair, _ in SAME_ROWS}
OTHERS |= {pair for group in GROUPS for pair in group}
GROUPS += [[pair] for pair in VARIANTS if pair not in OTHERS]


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "+".join(map("-".join, group)))
def test_recipes_train(group, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of files count from the project's folder
    config = from_dict(shrunk(*group))
    if config.training.input == "stream":
        extra("grain", "stream")
    folder = tmp_path / "run"
    train(config, folder, make_validate=no_validation, make_miner=make_miner, devices=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "trained"), SAME_ROWS, ids=["-".join(one) for one, _ in SAME_ROWS])
def test_times_that_are_numbers_are_the_rows_of_those_that_are_text(one, trained, monkeypatch):
    """Of equal rows and shapes a training is the same: it is not repeated."""
    monkeypatch.chdir(ROOT)
    config, other = (from_dict(shrunk(pair)) for pair in (one, trained))
    assert dataclasses.replace(config, data=other.data) == other
    found, expected = prepare(config), prepare(other)
    for part in ("train", "validation", "test"):
        for found_rows, rows in zip(
            *(jax.tree.leaves(vars(getattr(data, part))) for data in (found, expected)), strict=True
        ):
            np.testing.assert_array_equal(found_rows, rows)
    # A day of a table is text without the time of the day, of which a feature sees more.
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), data.features) for data in (found, expected)
    ]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of the small shop, that others measure and export: to be copied by who writes."""
    config = from_dict(shrunk(("shop", "plain")))
    return api.train(config, tmp_path_factory.mktemp("shop") / "run", devices=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), MEASURED)
def test_a_recipe_is_measured_and_exported(name, recipe, tmp_path, monkeypatch, request):
    monkeypatch.chdir(ROOT)
    config = from_dict(shrunk((name, recipe)))
    if name == "shop":
        run = request.getfixturevalue("plain")
    else:
        run = api.train(config, tmp_path / "run", devices=1)
    if name == "vectors":
        api.export(run)
    measured = api.evaluate(run, ks=(10,))
    assert 0 < measured["model"]["recall@10"] <= 1
    assert ("heads" in measured) == bool(config.objective.heads)
    assert ("index" in measured) == (name == "vectors")
    written = json.loads(api.metrics_path(run.workdir, "test").read_text())
    assert written["model"] == measured["model"]


@pytest.fixture(scope="module")
def run_to_export(plain, tmp_path_factory):
    """The same run in a folder that holds a bundle in the end."""
    workdir = tmp_path_factory.mktemp("vectors") / "run"
    return dataclasses.replace(plain, workdir=shutil.copytree(plain.workdir, workdir))


@pytest.mark.slow
@pytest.mark.parametrize("pair", EXPORTED, ids="-".join)
def test_a_recipe_is_exported(pair, run_to_export):
    """The export proves that its bundle scores as the trainer does: nothing is measured again."""
    config = from_dict(shrunk(pair))
    trained = run_to_export.config
    assert dataclasses.replace(config, retrieval=trained.retrieval) == trained
    graph = pair == ("vectors", "graph")
    if graph:
        extra("faiss", "faiss")
    manifest = api.export(dataclasses.replace(run_to_export, config=config)).manifest
    assert not graph or manifest["index"]["hnsw_m"] == 16
