"""A baseline as a run: two towers whose weights are its vectors.

The item tower reads a row of the item's table, the user tower the weighted mean of the rows of its
history (or a row of the user's table). A row has the vector of an item in a history, its own vector
and its popularity beside each other, and the one dense layer of a tower takes its part of them. So
a baseline is exported, served, tuned and measured by what does so for trained towers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from twotower.config import (
    Config,
    FeaturesConfig,
    HistoryConfig,
    ModelConfig,
    ObjectiveConfig,
    TowerConfig,
)
from twotower.core.fields import build
from twotower.evaluation.baselines.factors import Factors, make_factors
from twotower.evaluation.baselines.make import open_cache, training_lists, tuning_queries
from twotower.evaluation.baselines.tuning import FITTED
from twotower.evaluation.evaluate import evaluate, model_scores
from twotower.evaluation.queries import make_queries
from twotower.features.encoder import Encoder
from twotower.features.fit import fit_encoder
from twotower.features.spec import load_spec
from twotower.features.vocabulary import Vocabulary
from twotower.pipeline.prepare import PreparedData, with_features
from twotower.retrieval.bundle import Bundle
from twotower.retrieval.export import export
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.run import Run

# Weight of the popularity of an item beside the greatest score: it decides between items of one
# score, and for users of whom nothing is known.
POPULARITY = 1e-4
MEASURED_QUERIES = 10_000  # whose figures the manifest has, at most


def export_baseline(
    run: Run,
    name: str,
    folder: Path,
    *,
    dim: int,
    changes: Literal["carry", "drop"] = "carry",
    with_users: bool = True,
) -> Bundle:
    """Writes a baseline of a run as a bundle, with what it reaches in that form on the test rows.

    Args:
        run: Trained run, whose data the baseline is fitted on.
        name: Name of the baseline, a key of `twotower.evaluation.baselines.factors.MAKERS`.
        folder: Folder of the bundle.
        dim: Greatest width of the vectors.
        changes: Whether changes to the items of the bundle before are carried over.
        with_users: Whether the bundle holds the known users.

    Returns:
        The bundle. Its manifest has "baseline": {"name", "setting", "tried", "exact"}, where
        "exact" says whether no vector is narrower than the model.

    Raises:
        ConfigError: The baseline is no product of vectors, or the data does not allow it.
    """
    prepared = run.prepared
    tuning = tuning_queries(prepared)
    cache = open_cache(prepared, run.workdir / FITTED, training_lists(prepared), tuning)
    factors = make_factors(prepared, name, dim=dim, tuning=tuning, cache=cache)
    of_baseline = baseline_run(run, factors)
    choice = dataclasses.asdict(factors.choice)
    entries: dict[str, Any] = {"baseline": {"name": name, **choice, "exact": factors.is_exact}}
    # Measured as vectors and not as fitted: narrower ones lose something, and that is served.
    if len(prepared.test):
        entries["figures"] = {"test": _measure(of_baseline)}
    return export(of_baseline, folder, changes=changes, with_users=with_users, figures=entries)


def _measure(run: Run) -> dict[str, float]:
    """Returns the figures of the test rows, seen items masked."""
    # The path of a trained model, from its towers to its lists, which a service takes too.
    evaluation = run.config.evaluation
    queries = make_queries(run.prepared, "test", evaluation.query, sample=MEASURED_QUERIES)
    scores = model_scores(run.prepared, run.model, run.weights, queries)
    return evaluate(scores, queries, evaluation.ks, mask_seen=True)


def baseline_run(run: Run, factors: Factors) -> Run:
    """Returns a run that is never trained, whose towers rank as a baseline does.

    Of a history the last events are read, and an item that it holds twice counts twice; users of
    whom nothing is known get what is popular.

    Args:
        run: Run that the baseline was fitted on.
        factors: The baseline as vectors.
    """
    config = _config(run.config, factors)
    prepared = with_features(run.prepared, config, _encoder(run.prepared, config))
    model = TwoTower.build(config.model, prepared.encoder)
    # Shapes alone: nothing is drawn or compiled.
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    weights = _weights(prepared, factors, fresh)
    return dataclasses.replace(
        run, config=config, prepared=prepared, model=model, weights=weights, step=0, validated={}
    )


def _config(config: Config, factors: Factors) -> Config:
    """Returns the configuration of the towers."""
    dim = factors.items.shape[1]
    # One more than the vectors, for the popularity.
    layers = TowerConfig(layers=(dim + 1,))
    user: dict[str, Any] = {"history": {"type": "history", "max_length": factors.length}}
    width = 2 * dim + 1
    if factors.users is not None:
        user = {"user_id": {"type": "string", "embedding_size": dim}}
        width = dim + 1
    features = {"user": user, "item": {"item_id": {"type": "string", "embedding_size": width}}}
    # A weighted mean is all that the baselines need of a history, and recency gives the decay.
    history = HistoryConfig(kind="bag", recency=True, dropout=0.0)
    model = ModelConfig(user=layers, item=layers, history=history, normalize=False)
    # Neither labels nor widths of the towers that were trained.
    objective = ObjectiveConfig(label=config.objective.label)
    retrieval = dataclasses.replace(config.retrieval, dim=0)
    return dataclasses.replace(
        config,
        plugins=(),
        features=build(FeaturesConfig, features, "config.features"),
        model=model,
        objective=objective,
        retrieval=retrieval,
    )


def _encoder(prepared: PreparedData, config: Config) -> Encoder:
    """Returns an encoder that knows every item of the corpus, and every user of the log, by id."""
    spec = load_spec(config.features)
    encoder = fit_encoder(spec, prepared.raw.train, users=prepared.users, items=prepared.items)
    fitted = dict(encoder.fitted)
    # Not those of training alone: words and categories find items that nobody had yet.
    items = Vocabulary.fit(prepared.items["item_id"])
    users = Vocabulary.fit(prepared.users["user_id"])
    for key, state in fitted.items():
        known = users if key == ("user", "user_id") else items
        fitted[key] = dataclasses.replace(state, vocabulary=known)
    return dataclasses.replace(encoder, fitted=fitted, contract=prepared.encoder.contract)


def _weights(prepared: PreparedData, factors: Factors, fresh: Weights) -> Weights:
    """Returns weights of the towers by which they are the baseline."""
    dim = factors.items.shape[1]
    read = factors.read
    columns = [factors.items, factors.popularity[:, None]]
    if read is not None:
        # First: the user's tower takes the first columns of a row, the item's the last.
        columns.insert(0, read)
    rows = np.concatenate(columns, axis=1)
    tables = {}
    for name, table in fresh.tables.items():
        # Rows of unknown users and items, and padding, are zero.
        tables[name] = np.zeros(np.shape(table), np.float32)
    item_ids = prepared.features["item"]["item_id"]
    item_table = tables["item.item_id"]
    item_table[item_ids] = rows
    params = jax.tree.map(lambda x: np.zeros(np.shape(x), np.float32), fresh.params)
    width = rows.shape[1]
    # The item's own vector, and its popularity.
    kernel_of_item = np.eye(width, dtype=np.float32)[:, width - dim - 1 :]
    kernel_of_user = np.eye(width, dim + 1, dtype=np.float32)
    kernel_of_user[dim:] = 0.0
    greatest = np.abs(factors.items).sum(1).max(initial=0.0)
    if factors.users is not None:
        tables["user.user_id"][prepared.features["user"]["user_id"]] = factors.users
        kernel_of_user = np.eye(dim, dim + 1, dtype=np.float32)
        greatest *= np.abs(factors.users).max(initial=0.0)
    elif read is not None:
        greatest *= np.abs(read).max(initial=0.0)
        # The events of a history are scaled by the root of their width.
        kernel_of_user /= np.float32(np.sqrt(width))
        later = np.arange(factors.length)
        params["user"]["history"]["recency"] = (np.log(factors.decay) * later).astype(np.float32)
    bias = np.zeros(dim + 1, np.float32)
    bias[dim] = POPULARITY * greatest
    if not greatest:
        # Popularity is all that there is.
        bias[dim] = 1.0
    _set_dense(params["user"], kernel_of_user, bias)
    _set_dense(params["item"], kernel_of_item, np.zeros(dim + 1, np.float32))
    return Weights(params, tables, {})


def _set_dense(tower: Any, kernel: np.ndarray, bias: np.ndarray) -> None:
    """Puts a kernel and a bias in the place of those of the tower's only dense layer."""
    (layer,) = tower["mlp"].values()
    layer["kernel"] = kernel
    layer["bias"] = bias
