"""The time that a bundle takes to load and to answer one user: a million items to load, 200,000 to
ask, in this process.

    taskset -c 0 python -m experiments.benchmarks.bundle [--load_items=1000000 --ask_items=200000]
    [--keep=FOLDER] [--quick]

The bundles are those of a generated shop with fresh weights, whose items and users are drawn: unit
vectors as in `experiments.benchmarks.index`, titles, categories and prices repeated, 40 seen items
a user. Index, files and checks are those of an export. Loading is compared with the least that a
careful reader does, the SHA-256 of every file; an answer with the index alone, one query at a time.
Promised are answers of p50 under .3 ms and p99 under 2 ms at 200,000 items, and a million items
loaded in under 5 s. Times are of the processor, not of the clock, so that other work on the machine
is not counted. --keep leaves the bundles in a folder, and takes those that are there.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from absl import app, flags

from experiments.benchmarks import harness
from experiments.benchmarks.index import draw

_LOAD = flags.DEFINE_integer("load_items", 1_000_000, "Items of the bundle that is loaded.")
_ASK = flags.DEFINE_integer("ask_items", 200_000, "Items of the bundle that is asked.")
_KEEP = flags.DEFINE_string("keep", "", "Where to keep the bundles.")
USERS, SEEN, LOADS, CALLS, K = 50_000, 40, 3, 4_000, 10


def make(folder: Path, items: int) -> None:
    """Writes the bundle of `items` drawn items."""
    import jax

    from twotower.config import from_dict
    from twotower.core.arrays import Ragged
    from twotower.experiment import read
    from twotower.index.build import index_items
    from twotower.pipeline.prepare import prepare
    from twotower.retrieval.bundle import write_bundle
    from twotower.retrieval.export import make_bundle
    from twotower.towers.two_tower import TwoTower
    from twotower.training.run import Run

    values = read("quickstart")
    values.data.num_interactions = 5_000
    config = from_dict(values.to_dict())
    prepared = prepare(config)
    prepared = dataclasses.replace(prepared, encoder=_with_ids(prepared.encoder, items))
    model = TwoTower.build(config.model, prepared.encoder)
    small = make_bundle(Run(folder, config, prepared, model, model.init(jax.random.key(0)), 0))
    rng = np.random.default_rng(0)
    users, vectors = draw(items, small.towers.dim, USERS)
    counts = np.sort(rng.zipf(1.3, items) % 10_000)[::-1].astype(np.int64)
    seen = Ragged(np.arange(USERS + 1, dtype=np.int64) * SEEN, _distinct(rng, items))
    bundle = dataclasses.replace(
        small,
        vectors=vectors,
        items=_repeated(rng, small.items, "item_id", items),
        counts=counts,
        user_vectors=users,
        users=_repeated(rng, small.users, "user_id", USERS),
        seen=seen,
        seen_events=None,
        index=index_items(config, vectors, counts, users),
    )
    folder.mkdir(parents=True)
    write_bundle(bundle, folder, step=0)


def _with_ids(encoder: Any, items: int) -> Any:
    """Returns an encoder that knows the ids of all items and users."""
    from twotower.features.vocabulary import Vocabulary

    fitted = dict(encoder.fitted)
    for side, count in (("item", items), ("user", USERS)):
        before = fitted[side, f"{side}_id"].vocabulary
        ids = pa.array(_ids(f"{side}_id", count), pa.large_string())
        vocabulary = Vocabulary(ids, before.oov_rows)
        for key, state in fitted.items():
            # The vocabulary of a history is that of the items.
            if state.vocabulary is before:
                reads = {
                    name: np.resize(values, (vocabulary.size, *values.shape[1:]))
                    for name, values in state.reads.items()
                }
                fitted[key] = dataclasses.replace(state, vocabulary=vocabulary, reads=reads)
    return dataclasses.replace(encoder, fitted=fitted)


def _ids(name: str, count: int) -> list[str]:
    return [f"{name[:4]}-{number:07}" for number in range(count)]


def _distinct(rng: np.random.Generator, items: int) -> np.ndarray:
    """SEEN items of each user, one of each SEEN-th of the corpus."""
    part = items // SEEN
    return (
        (rng.integers(0, part, (USERS, SEEN)) + part * np.arange(SEEN)[None, :])
        .ravel()
        .astype(np.int32)
    )


def _repeated(rng: np.random.Generator, table: pa.Table, name: str, count: int) -> pa.Table:
    """`count` rows of a table in any order, with ids of their own."""
    rows = table.take(pa.array(rng.integers(0, len(table), count))).combine_chunks()
    return rows.set_column(rows.column_names.index(name), name, pa.array(_ids(name, count)))


def loading(folder: Path) -> dict[str, list[float]]:
    """Milliseconds of loads."""
    from twotower.core.files import digest
    from twotower.retrieval.retriever import Retriever

    files = [path for path in folder.rglob("*") if path.is_file()]
    runs = {
        "SHA-256 of its files": lambda: [digest(path) for path in files],
        "Retriever.load": lambda: Retriever.load(folder),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(LOADS):
        for name, run in runs.items():
            gc.collect()
            start = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - start))
    return times


def questions(retriever: Any) -> dict[str, Callable[[int], Any]]:
    """Returns the requests by name: call of a number from 0 on."""
    bundle = retriever.bundle
    rng = np.random.default_rng(1)
    rows = rng.permutation(len(bundle.users))
    users, vectors = (
        bundle.users["user_id"].take(pa.array(rows)).to_pylist(),
        np.ascontiguousarray(bundle.user_vectors[rows]),
    )
    items = bundle.items["item_id"].to_pylist()
    category = bundle.items["category"][0].as_py()
    price = float(np.median(bundle.items["price"].drop_null().to_numpy()))
    few = [items[row] for row in rng.integers(0, len(items), 1_000)]

    def ask(**more: Any) -> Callable[[int], Any]:
        return lambda n: retriever.recommend(users[n], k=K, **more)

    return {
        "the index alone": lambda n: bundle.index.search(vectors[n : n + 1], K),
        "recommend": ask(),
        "recommend, seen items too": ask(exclude_seen=False),
        "recommend, k=100": lambda n: retriever.recommend(users[n], k=100),
        "one category": ask(where={"category": category}),
        "half of the prices": ask(where=[("price", "<=", price)]),
        "five items denied": ask(deny=few[:5]),
        "1,000 items allowed": ask(allow=few),
        "an unknown user": lambda n: retriever.recommend(f"nobody-{n}", k=K),
    }


def answering(folder: Path) -> dict[str, list[float]]:
    """Milliseconds of each call, of all threads together."""
    from twotower.retrieval.retriever import Retriever

    times: dict[str, list[float]] = {}
    for name, call in questions(Retriever.load(folder)).items():
        for number in range(20):  # compiles, and remembers what the conditions match
            call(number)
        measured = []
        for number in range(CALLS // 10 if harness.QUICK.value else CALLS):
            start = time.process_time()
            call(number)
            measured.append(1e3 * (time.process_time() - start))
        times[name] = measured
    return times


def percentiles(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Prints p50 and p99 of each question, and the ratio to the first; and gives them."""
    print(f"milliseconds of a call\n{'':32}{'p50':>10}{'p99':>10}{'p50/base':>10}{'p99/base':>10}")
    found: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        found[name] = row = {f"p{share}": float(np.percentile(values, share)) for share in (50, 99)}
        base = next(iter(found.values()))
        row |= {f"{key}_ratio": row[key] / base[key] for key in ("p50", "p99")}
        print(
            f"{name:32}{row['p50']:10.3f}{row['p99']:10.3f}{row['p50_ratio']:10.2f}{row['p99_ratio']:10.2f}",
            flush=True,
        )
    return found


def main(argv: list[str]) -> None:
    load, ask = (20_000, 20_000) if harness.QUICK.value else (_LOAD.value, _ASK.value)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            count: Path(_KEEP.value or temporary) / f"items-{count}"
            for count in dict.fromkeys((ask, load))
        }
        for count, folder in folders.items():
            if not (folder / "manifest.json").exists():
                start = time.perf_counter()
                make(folder, count)
                spent = time.perf_counter() - start
                written = f"index built and bundle written in {spent:.0f} s"
                print(f"{count:,} items: {written}", flush=True)
        print(f"{ask:,} items, {USERS:,} users, lists of {K}")
        answers = percentiles(answering(folders[ask]))
        loads = harness.table(
            f"{load:,} items",
            loading(folders[load]),
            unit="milliseconds",
            base="SHA-256 of its files",
        )
    harness.write_json(
        "bundle", {"answers": answers, "loads": loads}, unit="milliseconds", base="the index alone"
    )


if __name__ == "__main__":
    app.run(main)
