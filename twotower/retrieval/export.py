"""Export of a run as a bundle.

The corpus is embedded, the index built, and the bundle written; loaded again, it must give the
scores of the trainer's towers before it becomes the current version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.arrays import Ragged, evenly_spaced
from twotower.core.errors import BundleError, ConfigError
from twotower.core.files import exclusive, explain_full_disk, next_version
from twotower.data.interactions import PARTS
from twotower.features.pretrained import PretrainedFeature
from twotower.index.base import TUNING_QUERIES
from twotower.index.build import index_items
from twotower.index.exact import top_k
from twotower.index.recall import list_ndcg, list_recall
from twotower.index.vectors import Int8Vectors, error_bound, quantize
from twotower.objectives.labels import label_logit
from twotower.pipeline.batches import SPANS, InteractionRows
from twotower.pipeline.prepare import PreparedData
from twotower.plugins import make_record
from twotower.retrieval import golden
from twotower.retrieval.bundle import Bundle, load_bundle, write_bundle
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.live.carry import publish_with_changes
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.shards.assign import rows_of_shards
from twotower.retrieval.tower_programs import TowerPrograms, embedding_weights, export_tower
from twotower.retrieval.user_items import items_of_users, latest_rows, rows_of_items
from twotower.retrieval.users import UserRows
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.run import Run

TOLERANCE = 1e-5  # of a score, relative to the largest where that is above 1
PARITY_ROWS = 256  # users and items whose scores are compared
AGAINST_FULL = (10, 100)  # K of the lists by which stored vectors are measured


def export(
    run: Run,
    folder: Path,
    *,
    changes: Literal["carry", "drop"] = "carry",
    with_users: bool = True,
    figures: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Bundle:
    """Writes the bundle of a run; an existing one is replaced only when the new one is whole.

    Args:
        run: A trained run, with the weights of one of its checkpoints.
        folder: Folder of the bundle.
        changes: Whether changes that were made to the items of the existing bundle are carried
            over to the new one, or forgotten.
        with_users: Whether the bundle holds the known users, with what they had. Without them,
            known users are answered as new ones are.
        figures: Further entries of the manifest: what was measured of the run.
        shards: Number of shards that the items are divided into; 1 leaves them whole.

    Returns:
        The bundle, with its manifest. If vectors are cut or stored as int8, the loss is measured
        there as "against_full": see `measure_against_full`.

    Raises:
        BundleError: The bundle, loaded again, does not score as the trainer does.
        BusyError: Another process makes a version of the bundle.
        ChangesError: A change cannot be carried over.
        ConfigError: `config.retrieval.dim` is not a width that the model was trained for.
    """
    stays = "The bundle before stays as it was. Give the same command again."
    with explain_full_disk(folder, stays), exclusive(folder, "export"):
        bundle = make_bundle(run, shards=shards)
        users = bundle.users
        more: dict[str, Any] = {**(figures or {}), "data": describe_data(run.prepared)}
        if not _has_full_vectors(run, bundle):
            more["against_full"] = measure_against_full(run, bundle)
        if not with_users:
            bundle = without_users(bundle)
        with next_version(folder) as version:
            golden_answers = golden.make(bundle)
            manifest = write_bundle(bundle, version, step=run.step, golden=golden_answers, **more)
            # In this order: servers load only what was found to be right.
            check_parity(run, version, users)
            publish_with_changes(folder, version, keep=changes == "carry")
    logging.info(
        "%s: %d items, %s index, checkpoint of step %d.",
        folder,
        len(bundle.items),
        bundle.index.kind,
        run.step,
    )
    return dataclasses.replace(bundle, manifest=manifest, folder=folder, version=version)


def make_bundle(run: Run, *, shards: int = 1) -> Bundle:
    """Embeds the corpus and the users of a run, and builds the index: a bundle in memory.

    Args:
        run: A trained run, with the weights of one of its checkpoints.
        shards: Number of shards that the items are divided into; 1 leaves them whole.

    Raises:
        ConfigError: `config.retrieval.dim` is not a width that the model was trained for.
    """
    logit = label_logit(run.config.objective, run.model, run.weights.params)
    # Cut first, so that vectors, programs and index are all of one width.
    model = served_model(run)
    if model is not run.model:
        # The loss fitted the scores of whole vectors alone.
        logit = None
    run = dataclasses.replace(run, model=model)
    prepared = run.prepared
    # Before the work: there may be too many of them.
    rows = rows_of_shards(prepared.items["item_id"], shards) if shards > 1 else ()
    vectors = embed_rows(run.model, run.weights, "item", prepared.features["item"])
    if run.config.retrieval.vectors == "int8":
        vectors = quantize(vectors)
    users = known_users(prepared)
    counts = item_counts(prepared)
    user_vectors = _embed_users(run, UserRows(prepared.encoder, users))
    # Rows of all parts: served users have seen what they were tested on, too.
    positives = [prepared.positives(part) for part in PARTS]
    seen = items_of_users(positives, num_users=len(users))
    return Bundle(
        config=run.config,
        encoder=prepared.encoder,
        towers=make_tower_programs(run, users),
        vectors=vectors,
        items=display_items(prepared),
        counts=counts,
        user_vectors=user_vectors,
        users=users,
        index=index_items(run.config, vectors, counts, user_vectors, shards=rows),
        seen=seen,
        seen_events=events_of_items(prepared, positives, rows_of_items(positives, seen)),
        kinds=make_record(run.config.plugins, files=False),
        probability=None if logit is None else logit._asdict(),
    )


def without_users(bundle: Bundle) -> Bundle:
    """Returns a bundle without its known users, their vectors and what they had."""
    nothing = np.zeros(0, bundle.seen.values.dtype)
    return dataclasses.replace(
        bundle,
        users=bundle.users.slice(0, 0),
        user_vectors=bundle.user_vectors[:0],
        seen=Ragged(np.zeros(1, np.int64), nothing),
        seen_events=None,
    )


def describe_data(prepared: PreparedData) -> dict[str, Any]:
    """Returns what data a model saw, for a manifest: rows of each part, and times from and to."""
    described: dict[str, Any] = {
        "rows": {part: len(getattr(prepared, part)) for part in PARTS},
        "users": len(prepared.users),
    }
    for part, rows in zip(PARTS, all_rows(prepared)):
        if rows.timestamp is None or not len(rows):
            continue
        # Not `datetime`, which knows years up to 9999 alone.
        first = np.datetime64(int(rows.timestamp.min()), "s")
        last = np.datetime64(int(rows.timestamp.max()), "s")
        described[part] = {"from": f"{first}Z", "to": f"{last}Z"}
    return described


def events_of_items(
    prepared: PreparedData, positives: Sequence[InteractionRows], rows: np.ndarray
) -> pa.Table | None:
    """Returns the time and the kind of event of some rows, as far as the log has them.

    Args:
        prepared: Prepared data of a run.
        positives: Positives of each part.
        rows: Positions among the joined positives, int64 [M].

    Returns:
        Columns timestamp (seconds since the epoch) and event, M rows; None where the log has
        neither.
    """
    logs = []
    for part, kept in zip(PARTS, positives):
        log: pa.Table = getattr(prepared.raw, part)
        columns = {}
        if kept.timestamp is not None:
            columns["timestamp"] = pa.array(kept.timestamp, pa.int64())
        if "event" in log.column_names:
            kinds = log["event"].filter(pa.array(prepared.is_positive(part)))
            columns["event"] = kinds.cast(pa.string())
        logs.append(pa.table(columns))
    # A part may lack a column that another has.
    joined = pa.concat_tables(logs, promote_options="default")
    if not joined.num_columns:
        return None
    events = joined.take(pa.array(rows)).combine_chunks()
    if "event" not in events.column_names:
        return events
    # A handful of kinds, each in millions of rows.
    position = events.column_names.index("event")
    return events.set_column(position, "event", events["event"].dictionary_encode())


def served_model(run: Run) -> TwoTower:
    """Returns the model of a run, cut to `config.retrieval.dim`."""
    model = run.model
    dim = run.config.retrieval.dim
    trained = run.config.objective.matryoshka
    if dim in (0, model.dim):
        return model
    if dim not in trained:
        widths = ", ".join(map(str, sorted({model.dim, *trained}, reverse=True)))
        raise ConfigError(
            f"config.retrieval.dim={dim} is not a width that the model was trained for: {widths}. "
            "Others are trained with config.objective.matryoshka."
        )
    return model.cut(dim)


def measure_against_full(run: Run, bundle: Bundle) -> dict[str, Any]:
    """Measures the loss of the stored vectors of a bundle against the whole float32 vectors.

    Both are searched exactly, for known users.

    Returns:
        "dim" of the whole vectors; "users", their number; "recall@K", the share of the top K by
        whole vectors that is in the top K by stored ones; and "ndcg@K" of these lists, in which the
        items found by whole vectors are the right ones.
    """
    rows = evenly_spaced(np.arange(len(bundle.users)), TUNING_QUERIES)
    users = _embed_users(run, UserRows(bundle.encoder, bundle.users.take(pa.array(rows))))
    items = embed_rows(run.model, run.weights, "item", run.prepared.features["item"])
    measured: dict[str, Any] = {"dim": run.model.dim, "users": len(users)}
    for k in AGAINST_FULL:
        length = min(k, len(items))
        _, full = top_k(users, items, length)
        _, stored = top_k(bundle.user_vectors[rows], bundle.vectors, length)
        measured[f"recall@{k}"] = round(list_recall(stored, full), 4)
        measured[f"ndcg@{k}"] = round(list_ndcg(stored, full), 4)
    return measured


def make_tower_programs(run: Run, users: pa.Table) -> TowerPrograms:
    """Returns the towers of a run as programs.

    Args:
        run: Run with its model and weights.
        users: Raw rows of users, at least one, as an example of what the towers read.
    """
    model = run.model
    arrays = jax.tree.map(np.asarray, embedding_weights(run.weights))
    # Any user will do as an example: through the encoder of raw rows, as requests come.
    one_user = UserRows(run.prepared.encoder, users.slice(0, 1))
    examples = {"user": next(one_user.encode_all()), "item": run.prepared.features["item"]}
    programs = {}
    for side, example in examples.items():
        # A default binds the side of this round; a closure would see that of the last.
        def embed(arrays: Any, features: Any, side: str = side) -> jax.Array:
            return model.embed(side, Weights(**arrays), features)

        programs[side] = export_tower(embed, arrays, example)
    return TowerPrograms(programs, arrays)


def known_users(prepared: PreparedData) -> pa.Table:
    """Returns user_id and the raw columns of the user features, a row a user.

    Context features, which belong to rows of the log, have the value of the user's latest row.
    """
    encoder = prepared.encoder
    history = encoder.spec.history
    own = []
    from_latest_row = []
    for name, feature in encoder.spec.user.items():
        columns = from_latest_row if name in encoder.context else own
        columns += feature.columns_read
    users = prepared.users
    # Histories as a request would bring them: all events of the user, by raw ids.
    if prepared.histories is not None and history is not None:
        others = [name for name in users.column_names if name != history.column]
        events = prepared.histories.to_requests(prepared.raw)
        users = users.select(others).append_column(history.column, events)
    users = users.select(list(dict.fromkeys(["user_id", *own])))
    if history is not None and history.request_gap:
        from_latest_row.append("timestamp")
    if from_latest_row:
        latest = _latest_raw_rows(prepared)
        for column in dict.fromkeys(from_latest_row):
            users = users.append_column(column, latest[column])
    return users


def _latest_raw_rows(prepared: PreparedData) -> pa.Table:
    """Returns the latest row of each user in the joined log; nulls of users without rows."""
    rows = latest_rows(all_rows(prepared), num_users=len(prepared.users))
    parts = [prepared.raw.train, prepared.raw.validation, prepared.raw.test]
    # Promoted: a part may lack a column, or hold nulls alone in it.
    log = pa.concat_tables(parts, promote_options="default")
    return log.take(pa.array(rows, mask=rows < 0))


def item_counts(prepared: PreparedData) -> np.ndarray:
    """Returns the training rows of each item that are positives, int64 [N]."""
    trained = prepared.positives("train").item
    # -1 stands for an item that is not in the corpus.
    return np.bincount(trained[trained >= 0], minlength=len(prepared.items))


def all_rows(prepared: PreparedData) -> tuple[InteractionRows, InteractionRows, InteractionRows]:
    """Returns the rows of all parts, in the order of the joined log."""
    return prepared.train, prepared.validation, prepared.test


def display_items(prepared: PreparedData) -> pa.Table:
    """Returns item_id and the columns that `config.retrieval.display` names, or all but vectors."""
    display = prepared.config.retrieval.display
    if not display:
        # Vectors of other models are no text for readers, and would double the size.
        vectors = set()
        for feature in prepared.encoder.spec.item.values():
            if isinstance(feature, PretrainedFeature) and not feature.path:
                vectors.add(feature.column)
        return prepared.items.drop_columns(sorted(vectors))
    return prepared.items.select(list(dict.fromkeys(["item_id", *display])))


def check_parity(run: Run, folder: Path, raw_users: pa.Table | None = None) -> None:
    """Compares scores of a bundle, loaded as a server would, with those of the trainer's towers.

    Scores by vectors stored as int8 may differ by their rounding, bounded item by item; those by
    the towers may not.

    Args:
        run: Run that the bundle was made of.
        folder: Folder of the bundle.
        raw_users: Raw rows of the known users; by default those that the bundle holds.

    Raises:
        BundleError: Scores differ by more.
    """
    retriever = Retriever(load_bundle(folder))
    bundle = retriever.bundle
    # Here and not at the first request: a re-ranker may name a column that items do not have.
    if bundle.config.retrieval.rerank.kind:
        anybody = run.prepared.users["user_id"][:1].to_pylist()
        retriever.recommend_many(anybody, bundle.config.retrieval.k)
    prepared = run.prepared
    model = served_model(run)
    latest = latest_rows(all_rows(prepared), num_users=len(prepared.users))
    # Users without a row have no context that the trainer could embed them with.
    users = evenly_spaced(np.flatnonzero(latest >= 0), PARITY_ROWS)
    items = evenly_spaced(np.arange(len(prepared.items)), PARITY_ROWS)

    # The trainer's vectors, from the arrays that it was trained on.
    user_features = _trained_user_features(prepared, users, latest[users])
    item_features = {name: values[items] for name, values in prepared.features["item"].items()}
    # Padded to the shapes of the whole corpus, whose programs are compiled: to run some thousands
    # of rows more costs less than to compile.
    num_users = len(prepared.users)
    user_vectors = embed_rows(model, run.weights, "user", user_features, like=num_users)
    item_vectors = embed_rows(model, run.weights, "item", item_features, like=len(prepared.items))
    trained = user_vectors @ item_vectors.T

    # The bundle's, from raw columns through its own encoder and programs.
    all_known = bundle.users
    if raw_users is not None:
        all_known = raw_users
    known = all_known.take(pa.array(users))
    user_rows = retriever.user_rows
    # Not by `encode_users`, which reads times in the unit of the log: these are seconds already.
    served_users = bundle.towers.embed("user", user_rows.encode(known))
    served_items = bundle.towers.embed("item", item_features)
    stored_items = bundle.vectors[items]
    rounding = _rounding(bundle, user_vectors, item_vectors)
    compare_scores(served_users @ stored_items.T, trained, rounding)
    compare_scores(served_users @ served_items.T, trained)

    if not len(bundle.users):
        return
    # Stored user vectors are for requests made now: where a feature reads the time, they differ
    # from those of the users' latest rows.
    now = bundle.towers.embed(
        "user", user_rows.encode(user_rows.take(known["user_id"].to_pylist()))
    )
    rounding = _rounding(bundle, now, item_vectors)
    stored_users = bundle.user_vectors[users]
    compare_scores(stored_users @ stored_items.T, now @ item_vectors.T, rounding)


def _trained_user_features(
    prepared: PreparedData, users: np.ndarray, latest: np.ndarray
) -> dict[str, Any]:
    """Returns the encoded features of users, as the trainer would read them at their latest rows.

    Args:
        prepared: Data of the run.
        users: Rows of the users table, int [U].
        latest: Position of each user's latest row in the joined log, int [U].
    """
    context = join_context(prepared, latest)
    # A served user has the history of all events, not of those before its latest row.
    if prepared.histories is not None:
        times = join_times(prepared, latest)
        context[SPANS] = prepared.histories.latest_spans(users, times)
    return dict(prepared.user_features(users, context))


def _rounding(bundle: Bundle, users: np.ndarray, items: np.ndarray) -> np.ndarray | float:
    """Returns the bound of the difference that stored item vectors make to scores, [B, N] or 0."""
    if not isinstance(bundle.vectors, Int8Vectors):
        return 0.0
    return error_bound(users, items)


def compare_scores(
    served: np.ndarray, trained: np.ndarray, rounding: np.ndarray | float = 0.0
) -> None:
    """Refuses scores [B, N] that differ from the trainer's by more than `TOLERANCE`.

    Args:
        served: Scores by the bundle, [B, N].
        trained: Scores by the trainer's towers, [B, N].
        rounding: Bound of the difference that rounded vectors make besides, [B, N].
    """
    # Relative to the largest: float32 has some seven digits, of scores of any size.
    scale = max(1.0, float(np.abs(trained).max(initial=0.0)))
    difference = np.abs(served - trained)
    if (difference <= TOLERANCE * scale + rounding).all():  # False where a score is NaN
        return
    worst = float(difference.max(initial=0.0))
    allowed = ""
    if np.any(rounding):
        allowed = f" (rounding to int8 allows {float(np.max(rounding)):.2e})"
    raise BundleError(
        f"The bundle's scores differ from the trainer's by up to {worst:.2e}{allowed}; "
        "nothing was exported."
    )


def join_times(prepared: PreparedData, rows: np.ndarray) -> np.ndarray | None:
    """Returns the times of rows of the joined log, int64 [R]; None if a part has no times."""
    times = [part.timestamp for part in all_rows(prepared) if part.timestamp is not None]
    if len(times) < len(PARTS):
        return None
    return np.concatenate(times)[rows]


def join_context(prepared: PreparedData, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the encoded context features of rows of the joined log, [R, ...] each."""
    context = {}
    for name in prepared.encoder.context:
        values = np.concatenate([part.context[name] for part in all_rows(prepared)])
        context[name] = values[rows]
    return context


def _has_full_vectors(run: Run, bundle: Bundle) -> bool:
    """Whether the bundle's vectors are those of the run, neither cut nor rounded."""
    return bundle.towers.dim == run.model.dim and not isinstance(bundle.vectors, Int8Vectors)


def _embed_users(run: Run, users: UserRows) -> np.ndarray:
    """Returns the vectors of known users, float32 [U, D]."""
    blocks = [embed_rows(run.model, run.weights, "user", block) for block in users.encode_all()]
    return np.concatenate(blocks)
