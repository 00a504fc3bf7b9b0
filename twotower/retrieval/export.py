"""From a run to a bundle: embed the corpus, build the index, write, prove that it scores as the
trainer did."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.arrays import evenly_spaced
from twotower.core.errors import BundleError, ConfigError
from twotower.core.files import discard, new_version, publish_version
from twotower.data.interactions import PARTS
from twotower.index.exact import top_k
from twotower.index.int8 import Int8Vectors, error_bound, quantize
from twotower.index.popularity import index_items
from twotower.index.recall import list_ndcg, list_recall
from twotower.index.tuning import TUNING_QUERIES
from twotower.pipeline.batches import Rows
from twotower.pipeline.histories import SPANS
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.bundle import Bundle, load_bundle, write_bundle
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.served import Towers, export_tower
from twotower.retrieval.user_items import items_of_users, latest_rows
from twotower.retrieval.users import UserRows
from twotower.retrieval.weights import of_towers
from twotower.towers.two_tower import TwoTower
from twotower.training.run import Run, load_run

TOLERANCE = 1e-5  # of a score, relative to the largest where that is above 1
PARITY_ROWS = 256
AGAINST_FULL = (10, 100)  # K of the lists that stored vectors are measured by


def export(run: Run, folder: Path) -> Bundle:
    """Writes the bundle of `run` to `folder`; one that is there is replaced only when the new one
    is whole.

    Returns:
        The bundle, with its manifest. Where vectors are cut or stored as int8, "against_full" there
        says what that loses: see `measure_against_full`.

    Raises:
        BundleError: the bundle, loaded again, does not score as the trainer does.
        ConfigError: `config.retrieval.dim` is not a width that the model was trained for.
    """
    bundle = make_bundle(run)
    more = {} if _is_full(run, bundle) else {"against_full": measure_against_full(run, bundle)}
    version = new_version(folder)
    try:
        manifest = write_bundle(bundle, version, step=run.step, **more)
        check_parity(run, version)
        publish_version(version)
    except BaseException:
        discard(version)
        with contextlib.suppress(OSError):
            folder.rmdir()  # which it was made for
        raise
    bundle = dataclasses.replace(bundle, manifest=manifest)
    logging.info(
        "%s: %d items, %s index, checkpoint of step %d.",
        folder,
        len(bundle.items),
        bundle.index.kind,
        run.step,
    )
    return bundle


def load_retriever(path: str | os.PathLike) -> Retriever:
    """Returns a retriever of a bundle, of a run, or of one of its checkpoints.

    A run is answered from its bundle, with the changes made to it. Where it has none, and for a
    checkpoint, a bundle is made in memory; of a run from the best checkpoint.

    Args:
        path: such a folder: runs/mine/bundle, runs/mine, or runs/mine/checkpoints/1000.

    Raises:
        BundleError: The folder is none of these, or the bundle is not whole.
        ChangesError: The log of changes to the bundle is damaged.
    """
    folder = Path(path)
    is_checkpoint = folder.parent.name == "checkpoints" and folder.name.isdigit()
    workdir = folder.parent.parent if is_checkpoint else folder
    is_run = (workdir / "config.json").exists() and (workdir / "checkpoints").exists()
    # A bundle has a config.json too, but no checkpoints.
    if not is_run:
        return Retriever.load(folder)
    if is_checkpoint:
        return Retriever(make_bundle(load_run(workdir, checkpoint=folder.name)))
    if (workdir / "bundle").exists():
        return Retriever.load(workdir / "bundle")
    return Retriever(make_bundle(load_run(workdir, checkpoint="best")))


def make_bundle(run: Run) -> Bundle:
    """Embeds the corpus and the users, and builds the index; raises `ConfigError` as `export`."""
    run = dataclasses.replace(run, model=served_model(run))
    prepared, model = run.prepared, run.model
    vectors = embed_rows(model, run.weights, "item", prepared.features["item"])
    vectors = quantize(vectors) if run.config.retrieval.vectors == "int8" else vectors
    users, counts = known_users(prepared), item_counts(prepared)
    encoded = UserRows(prepared.encoder, users).encode_all()
    user_vectors = np.concatenate(
        [embed_rows(model, run.weights, "user", block) for block in encoded]
    )
    index = index_items(run.config, vectors, counts, user_vectors)
    return Bundle(
        config=run.config,
        encoder=prepared.encoder,
        towers=make_towers(run),
        vectors=vectors,
        items=display_items(prepared),
        counts=counts,
        user_vectors=user_vectors,
        users=users,
        index=index,
        seen=items_of_users([prepared.positives(part) for part in PARTS], num_users=len(users)),
    )


def served_model(run: Run) -> TwoTower:
    """The model of a run, cut to `config.retrieval.dim`."""
    model, dim, trained = run.model, run.config.retrieval.dim, run.config.objective.matryoshka
    if dim in (0, model.dim):
        return model
    if dim not in trained:
        widths = ", ".join(map(str, sorted({model.dim, *trained}, reverse=True)))
        raise ConfigError(
            f"config.retrieval.dim={dim} is not a width that the model was trained for: {widths}. Others are trained with "
            "config.objective.matryoshka."
        )
    return model.cut(dim)


def measure_against_full(run: Run, bundle: Bundle) -> dict[str, Any]:
    """What the stored vectors of `bundle` lose, by exact search for known users, against the whole
    float32 vectors of `run`.

    Returns:
        "dim" of the whole vectors, "users" asked, "recall@K": share of the top K by whole vectors
        that is in the top K by stored ones, and "ndcg@K" of these lists, where what whole vectors
        find is what is right.
    """
    places = evenly_spaced(np.arange(len(bundle.users)), TUNING_QUERIES)
    encoded = UserRows(bundle.encoder, bundle.users.take(pa.array(places))).encode_all()
    users = np.concatenate([embed_rows(run.model, run.weights, "user", block) for block in encoded])
    items = embed_rows(run.model, run.weights, "item", run.prepared.features["item"])
    found, measured = {}, {"dim": run.model.dim, "users": len(users)}
    for k in AGAINST_FULL:
        pairs = (users, items), (bundle.user_vectors[places], bundle.vectors)
        full, stored = (top_k(*pair, min(k, len(items)))[1] for pair in pairs)
        found |= {f"recall@{k}": list_recall(stored, full), f"ndcg@{k}": list_ndcg(stored, full)}
    return measured | {name: round(value, 4) for name, value in found.items()}


def _is_full(run: Run, bundle: Bundle) -> bool:
    """Whether the bundle has the vectors of the run as they are."""
    return bundle.towers.dim == run.model.dim and not isinstance(bundle.vectors, Int8Vectors)


def make_towers(run: Run) -> Towers:
    """The towers of a run as programs."""
    arrays = jax.tree.map(np.asarray, of_towers(run.weights))
    known = UserRows(run.prepared.encoder, known_users(run.prepared).slice(0, 1))
    examples = {"user": next(known.encode_all()), "item": run.prepared.features["item"]}
    return Towers(
        {side: export_tower(run.model, arrays, side, x) for side, x in examples.items()}, arrays
    )


def known_users(prepared: PreparedData) -> pa.Table:
    """user_id and the raw columns of the user features; of context features, the value in the
    user's latest row."""
    encoder = prepared.encoder
    columns = {name: feature.column for name, feature in encoder.spec.user.items()}
    own = dict.fromkeys(
        ["user_id", *(column for name, column in columns.items() if name not in encoder.context)]
    )
    users = prepared.users
    if prepared.histories is not None:
        column = encoder.spec.history.column
        users = users.select([n for n in users.column_names if n != column]).append_column(
            column, prepared.histories.to_requests(prepared.raw)
        )
    users = users.select(list(own))
    asked_when = encoder.spec.history is not None and encoder.spec.history.request_gap
    if encoder.context or asked_when:
        places = latest_rows(all_rows(prepared), num_users=len(users))
        log = pa.concat_tables(
            [prepared.raw.train, prepared.raw.validation, prepared.raw.test],
            promote_options="default",
        )
        latest = log.take(pa.array(places, mask=places < 0))
        read = [columns[name] for name in encoder.context] + ["timestamp"] * asked_when
        for column in dict.fromkeys(read):
            users = users.append_column(column, latest[column])
    return users


def item_counts(prepared: PreparedData) -> np.ndarray:
    """int64 [N], the training rows of each item that are positives."""
    trained = prepared.positives("train").item
    return np.bincount(trained[trained >= 0], minlength=len(prepared.items))


def all_rows(prepared: PreparedData) -> tuple[Rows, Rows, Rows]:
    return prepared.train, prepared.validation, prepared.test


def display_items(prepared: PreparedData) -> pa.Table:
    """item_id and the columns that `config.retrieval.display` names, or all."""
    display = prepared.config.retrieval.display
    return (
        prepared.items.select(list(dict.fromkeys(["item_id", *display])))
        if display
        else prepared.items
    )


def check_parity(run: Run, folder: Path) -> None:
    """Compares scores of the bundle in `folder`, loaded as a server would, with those of the
    trainer's towers, cut as it says.

    Of vectors stored as int8 they may differ by what rounding explains, item by item; those of the
    towers may not.
    """
    retriever = Retriever(load_bundle(folder))
    bundle, prepared, model = retriever.bundle, run.prepared, served_model(run)
    latest = latest_rows(all_rows(prepared), num_users=len(prepared.users))
    users = evenly_spaced(np.flatnonzero(latest >= 0), PARITY_ROWS)
    items = evenly_spaced(np.arange(len(prepared.items)), PARITY_ROWS)
    context = joined_context(prepared, latest[users])
    if prepared.histories is not None:  # users are served with all that they did
        context[SPANS] = prepared.histories.latest_spans(users, when(prepared, latest[users]))
    user_features = prepared.user_features(users, context)
    item_features = {name: values[items] for name, values in prepared.features["item"].items()}
    user_vectors = embed_rows(model, run.weights, "user", user_features)
    item_vectors = embed_rows(model, run.weights, "item", item_features)
    trained = user_vectors @ item_vectors.T
    known = bundle.users.take(pa.array(users))
    rounding = (
        error_bound(user_vectors, item_vectors) if isinstance(bundle.vectors, Int8Vectors) else 0.0
    )
    compare_scores(retriever.encode_users(known) @ bundle.vectors[items].T, trained, rounding)
    compare_scores(
        retriever.encode_users(known) @ bundle.towers.embed("item", item_features).T, trained
    )
    # Stored vectors are of users asked about now, which a context of time tells from their latest
    # row.
    now = retriever.encode_users(retriever.user_rows.take(known["user_id"].to_pylist()))
    rounding = error_bound(now, item_vectors) if isinstance(bundle.vectors, Int8Vectors) else 0.0
    compare_scores(
        bundle.user_vectors[users] @ bundle.vectors[items].T, now @ item_vectors.T, rounding
    )


def compare_scores(
    served: np.ndarray, trained: np.ndarray, rounding: np.ndarray | float = 0.0
) -> None:
    """Refuses scores [Q, N] that differ by more than `TOLERANCE` and what `rounding` [Q, N] allows
    each."""
    scale = max(1.0, float(np.abs(trained).max(initial=0.0)))
    differ = np.abs(served - trained)
    if not (differ <= TOLERANCE * scale + rounding).all():  # also where a score is NaN
        worst = float(differ.max(initial=0.0))
        allowed = (
            f" (rounding to int8 allows {float(np.max(rounding)):.2e})" if np.any(rounding) else ""
        )
        raise BundleError(
            f"The bundle's scores differ from the trainer's by up to {worst:.2e}{allowed}; nothing was exported."
        )


def when(prepared: PreparedData, places: np.ndarray) -> np.ndarray | None:
    """Times of rows of train, validation and test joined; None without."""
    times = [rows.timestamp for rows in all_rows(prepared)]
    return None if any(x is None for x in times) else np.concatenate(times)[places]


def joined_context(prepared: PreparedData, places: np.ndarray) -> dict[str, np.ndarray]:
    """Encoded context of rows of train, validation and test joined."""
    parts = all_rows(prepared)
    return {
        name: np.concatenate([part.context[name] for part in parts])[places]
        for name in prepared.encoder.context
    }
