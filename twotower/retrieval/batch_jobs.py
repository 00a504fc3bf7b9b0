"""Batch jobs over all users and items: vectors, and lists, as Parquet in parts; killed at any
moment, they go on where they were.

A part is a file that is there whole or not at all. What the parts are of (the model, the number of
rows, the options) stands in job.json beside them, and another job does not go on in the same
folder. Several processes share a job: task t of n makes the parts t, t + n, t + 2 n, ... and needs
nothing from the others but the folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.errors import ConfigError
from twotower.core.files import atomic
from twotower.core.mesh import REPLICATED, SHARDED, make_mesh, put
from twotower.core.progress import progress
from twotower.index.exact import ExactIndex
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.export import known_users
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.users import UserRows
from twotower.retrieval.weights import embedding_weights, model_version
from twotower.training.run import Run

PART = 65_536  # rows of a file


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Which of several processes this is: `task` of `tasks`."""

    task: int = 0
    tasks: int = 1

    def __post_init__(self):
        if not 0 <= self.task < self.tasks:
            raise ConfigError(
                f"--task={self.task} must lie in [0, {self.tasks}), the tasks of --tasks={self.tasks}."
            )


def embed_all(
    run: Run, out: Path, *, devices: int = 0, tasks: Tasks = Tasks(), part: int = PART
) -> None:
    """Writes out/users and out/items: an id and a `vector` in each row, embedded on `devices` (0:
    all)."""
    model, prepared = run.model, run.prepared
    weights = divided(run.weights, devices)
    job = {
        "job": "embed",
        "model_version": model_version(jax.tree.map(np.asarray, embedding_weights(run.weights))),
        "step": run.step,
    }
    users = known_users(prepared)
    known = UserRows(prepared.encoder, users)

    def vectors(
        side: str, ids: pa.ChunkedArray, encode: Callable[[slice], Mapping[str, np.ndarray]]
    ) -> None:
        def make(rows: slice) -> pa.Table:
            found = embed_rows(model, weights, side, encode(rows))
            return vector_table(f"{side}_id", ids.slice(rows.start, rows.stop - rows.start), found)

        write_parts(out / f"{side}s", job | {"side": side}, len(ids), make, tasks=tasks, part=part)

    features = prepared.features["item"]
    vectors("user", users["user_id"], lambda rows: known.encode(known.slice(rows.start, rows.stop)))
    vectors(
        "item",
        prepared.items["item_id"],
        lambda rows: {name: x[rows] for name, x in features.items()},
    )


def recommend_all(
    folder: Path,
    out: Path,
    k: int,
    *,
    exclude_seen: bool = True,
    approximate: bool = False,
    devices: int = 0,
    recall_target: float = 1.0,
    tasks: Tasks = Tasks(),
    part: int = PART,
) -> None:
    """Writes the lists of all known users of the bundle in `folder`: user_id, rank, item_id, score.

    Args:
        approximate: ask the bundle's index; otherwise the search is exact, the items divided over
            `devices` (0: all).
        recall_target: of that search on TPUs; see `ExactIndex`.
    """
    bundle = load_bundle(folder)
    if not approximate:
        index = ExactIndex(
            bundle.vectors,
            normalized=bundle.normalized,
            mesh=make_mesh(devices),
            recall_target=recall_target,
        )
        bundle = dataclasses.replace(bundle, index=index)
    retriever = Retriever(bundle)
    job = {
        "job": "recommend",
        "bundle": bundle.manifest["sha256"],
        "k": k,
        "exclude_seen": exclude_seen,
        "approximate": approximate,
        "recall_target": recall_target,
        "changes": retriever.changes,
    }
    ids = bundle.users["user_id"]

    def make(rows: slice) -> pa.Table:
        asked = ids.slice(rows.start, rows.stop - rows.start).to_pylist()
        return retriever.recommend_many(asked, k, exclude_seen=exclude_seen)

    write_parts(out, job, len(ids), make, tasks=tasks, part=part)


def write_parts(
    out: Path,
    job: Mapping[str, Any],
    rows: int,
    make: Callable[[slice], pa.Table],
    *,
    tasks: Tasks,
    part: int,
) -> None:
    """Writes out/part-NNNNNN.parquet for every `part` rows, but for those that are there.

    Raises:
        ConfigError: the folder holds another job, or something else.
    """
    job = {**job, "rows": rows, "part": part}
    _claim(out, job)
    left = [
        n for n in range(tasks.task, -(-rows // part), tasks.tasks) if not _path(out, n).exists()
    ]
    for number in progress(left, total=len(left), what=f"Writing {out.name}"):
        table = make(slice(number * part, min(rows, (number + 1) * part)))
        # Vectors hardly repeat: a dictionary of them would only cost time.
        repeated = [name for name in table.column_names if name != "vector"]
        with atomic(_path(out, number)) as temporary:
            pq.write_table(table, temporary, compression="zstd", use_dictionary=repeated)
    logging.info("%s: %d parts of %d rows.", out, -(-rows // part), part)


def vector_table(name: str, ids: pa.ChunkedArray, vectors: np.ndarray) -> pa.Table:
    """Ids beside vectors as lists of D floats."""
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    return pa.table(
        {name: ids, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    )


def divided(weights: Any, devices: int) -> Any:
    """Weights on a mesh: tables by rows, all else on every device; as they are where there is one
    device."""
    mesh = make_mesh(devices)
    if mesh.size == 1:
        return weights
    host = jax.tree.map(np.asarray, weights)
    return host._replace(
        params=put(mesh, host.params, REPLICATED),
        tables=put(mesh, host.tables, SHARDED),
        batch_stats=put(mesh, host.batch_stats, REPLICATED),
    )


def _claim(out: Path, job: Mapping[str, Any]) -> None:
    path = out / "job.json"
    if path.exists():
        try:
            known = json.loads(path.read_text())
        except ValueError:
            known = {}
        names = [name for name in {**known, **job} if known.get(name) != job.get(name)]
        changed = [f"{name} {known.get(name)!r}, not {job.get(name)!r}" for name in names]
        if changed:
            raise ConfigError(
                f"{out} holds another job ({'; '.join(changed)}). Name a new folder, or delete this one."
            )
        return
    if out.exists() and any(not name.name.startswith(".") for name in out.iterdir()):
        raise ConfigError(f"{out} holds other files and no job.json. Name a new folder.")
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(job, indent=2, sort_keys=True) + "\n")


def _path(out: Path, number: int) -> Path:
    return out / f"part-{number:06}.parquet"
