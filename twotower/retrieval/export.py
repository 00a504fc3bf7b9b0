"""From a run to a bundle: embed the corpus, build the index, write, prove that it scores as the trainer did."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
from absl import logging

from twotower.data import split
from twotower.data.batches import Rows
from twotower.data.folders import replacing
from twotower.data.histories import SPANS
from twotower.data.prepare import Prepared
from twotower.retrieval.bundle import Bundle, BundleError, load_bundle, write_bundle
from twotower.retrieval.embed import embed_rows, evenly_spaced
from twotower.retrieval.history import items_of_users, latest_rows
from twotower.retrieval.popularity import index_items
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.served import Towers, export_tower
from twotower.retrieval.users import UserRows
from twotower.retrieval.weights import of_towers
from twotower.training.run import Run

TOLERANCE = 1e-5  # of a score, relative to the largest where that is above 1
PARITY_ROWS = 256


def export(run: Run, folder: Path) -> Bundle:
    """Writes the bundle of `run` to `folder`; one that is there is replaced only when the new one is whole.

    Raises:
        BundleError: the bundle, loaded again, does not score as the trainer does.
    """
    bundle = make_bundle(run)
    with replacing(folder) as temporary:
        write_bundle(bundle, Path(temporary), step=run.step)
        check_parity(run, Path(temporary))
    logging.info(
        "%s: %d items, %s index, checkpoint of step %d.", folder, len(bundle.items), bundle.index.kind, run.step
    )
    return bundle


def make_bundle(run: Run) -> Bundle:
    """Embeds the corpus and the users, and builds the index."""
    prepared, model = run.prepared, run.model
    vectors = embed_rows(model, run.weights, "item", prepared.features["item"])
    users, counts = known_users(prepared), item_counts(prepared)
    encoded = UserRows(prepared.encoder, users).encoded()
    user_vectors = np.concatenate([embed_rows(model, run.weights, "user", block) for block in encoded])
    index = index_items(run.config, vectors, counts, user_vectors)
    return Bundle(
        config=run.config, encoder=prepared.encoder, towers=make_towers(run), vectors=vectors, items=display_items(prepared),
        counts=counts, user_vectors=user_vectors, users=users, index=index,
        seen=items_of_users([prepared.positives(part) for part in split.PARTS], num_users=len(users)),
    )  # fmt: skip


def make_towers(run: Run) -> Towers:
    """The towers of a run as programs."""
    arrays = jax.tree.map(np.asarray, of_towers(run.weights))
    known = UserRows(run.prepared.encoder, known_users(run.prepared).slice(0, 1))
    examples = {"user": next(known.encoded()), "item": run.prepared.features["item"]}
    return Towers({side: export_tower(run.model, arrays, side, x) for side, x in examples.items()}, arrays)


def known_users(prepared: Prepared) -> pa.Table:
    """user_id and the raw columns of the user features; of context features, the value in the user's latest row."""
    encoder = prepared.encoder
    columns = {name: feature.column for name, feature in encoder.spec.user.items()}
    own = dict.fromkeys(["user_id", *(column for name, column in columns.items() if name not in encoder.context)])
    users = prepared.users
    if prepared.histories is not None:
        column = encoder.spec.history.column
        users = users.select([n for n in users.column_names if n != column]).append_column(
            column, prepared.histories.stored(prepared.raw)
        )
    users = users.select(list(own))
    if encoder.context:
        places = latest_rows(all_rows(prepared), num_users=len(users))
        log = pa.concat_tables(
            [prepared.raw.train, prepared.raw.validation, prepared.raw.test], promote_options="default"
        )
        latest = log.take(pa.array(places, mask=places < 0))
        for column in dict.fromkeys(columns[name] for name in encoder.context):
            users = users.append_column(column, latest[column])
    return users


def item_counts(prepared: Prepared) -> np.ndarray:
    """int64 [N], the training rows of each item that are positives."""
    trained = prepared.positives("train").item
    return np.bincount(trained[trained >= 0], minlength=len(prepared.items))


def all_rows(prepared: Prepared) -> tuple[Rows, Rows, Rows]:
    return prepared.train, prepared.validation, prepared.test


def display_items(prepared: Prepared) -> pa.Table:
    """item_id and the columns that `config.retrieval.display` names, or all."""
    display = prepared.config.retrieval.display
    return prepared.items.select(list(dict.fromkeys(["item_id", *display]))) if display else prepared.items


def check_parity(run: Run, folder: Path) -> None:
    """Compares scores of the bundle in `folder`, loaded as a server would, with those of the trainer's towers."""
    retriever = Retriever(load_bundle(folder))
    bundle, prepared, model = retriever.bundle, run.prepared, run.model
    latest = latest_rows(all_rows(prepared), num_users=len(prepared.users))
    users = evenly_spaced(np.flatnonzero(latest >= 0), PARITY_ROWS)
    items = evenly_spaced(np.arange(len(prepared.items)), PARITY_ROWS)
    context = joined_context(prepared, latest[users])
    if prepared.histories is not None:  # users are served with all that they did
        context[SPANS] = prepared.histories.now(users)
    user_features = prepared.user_features(users, context)
    item_features = {name: values[items] for name, values in prepared.features["item"].items()}
    user_vectors = embed_rows(model, run.weights, "user", user_features)
    item_vectors = embed_rows(model, run.weights, "item", item_features)
    trained = user_vectors @ item_vectors.T
    known = bundle.users.take(pa.array(users))
    compare_scores(retriever.encode_users(known) @ bundle.vectors[items].T, trained)
    compare_scores(retriever.encode_users(known) @ bundle.towers.embed("item", item_features).T, trained)
    # Stored vectors are of users asked about now, which a context of time tells from their latest row.
    now = retriever.encode_users(retriever.user_rows.rows_of(known["user_id"].to_pylist()))
    compare_scores(bundle.user_vectors[users] @ bundle.vectors[items].T, now @ item_vectors.T)


def compare_scores(served: np.ndarray, trained: np.ndarray) -> None:
    """Refuses scores that differ by more than `TOLERANCE`."""
    scale = max(1.0, float(np.abs(trained).max(initial=0.0)))
    worst = float(np.abs(served - trained).max(initial=0.0))
    if not worst <= TOLERANCE * scale:  # also where a score is NaN
        raise BundleError(f"The bundle's scores differ from the trainer's by up to {worst:.2e}; nothing was exported.")


def joined_context(prepared: Prepared, places: np.ndarray) -> dict[str, np.ndarray]:
    """Encoded context of rows of train, validation and test joined."""
    parts = all_rows(prepared)
    return {name: np.concatenate([part.context[name] for part in parts])[places] for name in prepared.encoder.context}
