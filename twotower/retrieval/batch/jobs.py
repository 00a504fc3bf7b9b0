"""Batch jobs over all users and items: vectors and lists as Parquet, in parts.

A job that was killed goes on where it was. A part is a file that is whole or does not exist. The
model, the number of rows and the options stand beside the folder, in NAME_job.json, and another job
does not go on in the same folder. The folder holds parts alone, so that any reader of Parquet takes
it. Several processes share a job: task t of n makes the parts t, t + n,
t + 2 n, ... and needs nothing from the others but the folder. A part has the same bytes whichever
process makes it. NAME_manifest.json stands beside the folder when all parts are there, and only
then: the process that ends last writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.errors import ConfigError
from twotower.core.files import atomic
from twotower.core.mesh import make_mesh
from twotower.core.progress import progress
from twotower.index.exact import ExactIndex
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.embed import embed_rows, shard_weights
from twotower.retrieval.export import known_users
from twotower.retrieval.rerank import RerankLike, as_config
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.tower_programs import embedding_weights, model_version
from twotower.retrieval.users import UserRows
from twotower.training.run import Run

PART_ROWS = 65_536  # rows of a file, at most as many are computed again after a kill

# A slice of the rows -> their encoded features [rows, ...].
EncodeRows = Callable[[slice], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The share of one of several processes that work on a job.

    Attributes:
        task: Number of this process, from 0.
        tasks: Number of processes.
    """

    task: int = 0
    tasks: int = 1

    def __post_init__(self):
        if not 0 <= self.task < self.tasks:
            raise ConfigError(
                f"--task={self.task} must lie in [0, {self.tasks}), the tasks of "
                f"--tasks={self.tasks}."
            )


def embed_all(
    run: Run, out: Path, *, devices: int = 0, tasks: Tasks = Tasks(), part: int = PART_ROWS
) -> None:
    """Writes out/users and out/items: an id and a `vector` in each row.

    Args:
        run: A trained run.
        out: Folder of the job.
        devices: Number of devices to embed on; 0 takes all.
        tasks: Share of this process.
        part: Rows of a file.
    """
    prepared = run.prepared
    # Before the weights are divided: other processes, with other devices, must say the same.
    version = model_version(jax.tree.map(np.asarray, embedding_weights(run.weights)))
    job = {"job": "embed", "model_version": version, "step": run.step}
    users = known_users(prepared)
    user_rows = UserRows(prepared.encoder, users)
    items = prepared.features["item"]

    def encode_users(rows: slice) -> Mapping[str, np.ndarray]:
        return user_rows.encode(user_rows.slice(rows.start, rows.stop))

    def encode_items(rows: slice) -> Mapping[str, np.ndarray]:
        return {name: values[rows] for name, values in items.items()}

    # Divided over the devices once, for all parts of both sides.
    run = dataclasses.replace(run, weights=shard_weights(run.weights, devices))
    sides: tuple[tuple[Literal["user", "item"], pa.ChunkedArray, EncodeRows], ...] = (
        ("user", users["user_id"], encode_users),
        ("item", prepared.items["item_id"], encode_items),
    )
    for side, ids, encode in sides:
        # `partial` and not a closure, which would see the side of the last round.
        make = functools.partial(_embed_part, run, side, ids, encode)
        side_job = job | {"side": side}
        write_parts(out / f"{side}s", side_job, len(ids), make, tasks=tasks, part=part)


def recommend_all(
    folder: Path,
    out: Path,
    k: int,
    *,
    exclude_seen: bool = True,
    approximate: bool = False,
    devices: int = 0,
    recall_target: float = 1.0,
    rerank: RerankLike = None,
    tasks: Tasks = Tasks(),
    part: int = PART_ROWS,
) -> None:
    """Writes the lists of all known users of a bundle: user_id, rank, item_id, score.

    Args:
        folder: Folder of the bundle.
        out: Folder of the job.
        k: Length of the lists.
        exclude_seen: Whether to leave out the items of each user.
        approximate: Whether to search the bundle's index; otherwise the search is exact.
        devices: Number of devices that the items are divided over in exact search; 0 takes all.
        recall_target: Recall of that search on TPUs; see `ExactIndex`.
        rerank: Re-ranker in the place of that of the bundle's configuration.
        tasks: Share of this process.
        part: Users of a file.
    """
    bundle = load_bundle(folder)
    # Exact by default: for all users at once the accelerator is busy anyway, and nobody waits.
    if not approximate:
        index = ExactIndex(
            bundle.vectors,
            normalized=bundle.normalized,
            mesh=make_mesh(devices),
            recall_target=recall_target,
        )
        bundle = dataclasses.replace(bundle, index=index)
    retriever = Retriever(bundle)
    # All that the lists depend on, so that a job is never gone on with after a change.
    job = {
        "job": "recommend",
        "bundle": bundle.manifest["sha256"],
        "k": k,
        "exclude_seen": exclude_seen,
        "approximate": approximate,
        "recall_target": recall_target,
        "changes": retriever.changes,
    }
    # The choice of the configuration is part of the bundle already.
    if rerank is not None:
        job["rerank"] = dataclasses.asdict(as_config(rerank))
    ids = bundle.users["user_id"]
    if not len(ids):
        raise ConfigError(f"{folder} was exported without its users: there are none to list.")

    def make(rows: slice) -> pa.Table:
        users = ids.slice(rows.start, rows.stop - rows.start).to_pylist()
        return retriever.recommend_many(users, k, exclude_seen=exclude_seen, rerank=rerank)

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

    Args:
        out: Folder of the job.
        job: Description of the job, which must be the same in every call.
        rows: Number of all rows.
        make: Function from some rows to their table.
        tasks: Share of this process.
        part: Rows of a file.

    Raises:
        ConfigError: The folder holds another job, or something else.
    """
    # The number of tasks is no part of the job: it may differ when the job goes on.
    _claim(out, {**job, "rows": rows, "part": part})
    num_parts = -(-rows // part)
    manifest = out.with_name(f"{out.name}_manifest.json")
    # Somebody may have deleted parts: before they are there again the folder is not whole.
    if _count_parts(out, num_parts) < num_parts:
        manifest.unlink(missing_ok=True)
    own = range(tasks.task, num_parts, tasks.tasks)
    missing = [number for number in own if not _path(out, number).exists()]
    for number in progress(missing, total=len(missing), what=f"Writing {out.name}"):
        table = make(slice(number * part, min(rows, (number + 1) * part)))
        # Vectors hardly repeat: a dictionary of them would only cost time.
        repeated = [name for name in table.column_names if name != "vector"]
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": repeated}
        with atomic(_path(out, number)) as temporary:
            pq.write_table(table, temporary, **options)
    count = _count_parts(out, num_parts)
    if count == num_parts:
        # Two that end together write the same.
        _write_manifest(manifest, out, num_parts, job)
    rest = "" if count == num_parts else "; other tasks make the rest"
    logging.info("%s: %d of %d parts of %d rows%s.", out, count, num_parts, part, rest)


def _count_parts(out: Path, num_parts: int) -> int:
    return sum(_path(out, number).exists() for number in range(num_parts))


def _write_manifest(path: Path, out: Path, num_parts: int, job: Mapping[str, Any]) -> None:
    """Writes what a job is and the rows of each of its parts, all of which are there."""
    names = [_path(out, number) for number in range(num_parts)]
    parts = {name.name: pq.read_metadata(name).num_rows for name in names}
    content = {"job": dict(job), "rows": sum(parts.values()), "parts": parts}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _embed_part(
    run: Run, side: Literal["user", "item"], ids: pa.ChunkedArray, encode: EncodeRows, rows: slice
) -> pa.Table:
    """Returns the ids of some rows beside their vectors, lists of D floats."""
    vectors = embed_rows(run.model, run.weights, side, encode(rows))
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    columns = {
        f"{side}_id": ids.slice(rows.start, rows.stop - rows.start),
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    return pa.table(columns)


def _claim(out: Path, job: Mapping[str, Any]) -> None:
    """Writes the description of a job, or checks that an existing one says the same."""
    # Beside the folder: some readers of folders refuse any other file in them.
    path = out.with_name(f"{out.name}_job.json")
    # Without the folder it is of parts that were deleted.
    if path.exists() and out.exists():
        try:
            known = json.loads(path.read_text())
        # A file that is cut or foreign says nothing that agrees, and is refused below.
        except ValueError:
            known = {}
        differing = [name for name in {**known, **job} if known.get(name) != job.get(name)]
        if differing:
            changes = [f"{name} {known.get(name)!r}, not {job.get(name)!r}" for name in differing]
            raise ConfigError(
                f"{out} holds another job ({'; '.join(changes)}). Name a new folder, or delete "
                "this one."
            )
        return
    # Files whose names begin with a dot are those of atomic writes by other tasks.
    has_files = out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir())
    # Looked for once more: another task may have begun the job meanwhile, and made a part.
    if has_files and path.exists():
        _claim(out, job)
        return
    if has_files:
        raise ConfigError(f"{out} holds files, and there is no {path}. Name a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(job, indent=2, sort_keys=True) + "\n")


def _path(out: Path, number: int) -> Path:
    return out / f"part-{number:06}.parquet"
