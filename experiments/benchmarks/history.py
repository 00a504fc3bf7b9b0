"""The time to keep, read and compare vectors, and lists from Redis against new ones.

    python -m experiments.benchmarks.history [--quick] [--json=FILE]
    [--redis=redis://localhost:6379/9 --workdir=RUN]

A million vectors of width 64 (with --quick, a tenth) beside `numpy.save` of the same. The part with
Redis wants a server and the bundle of a run; its keys begin with "benchmark" and live for ten
minutes.
"""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import app, flags

from experiments.benchmarks import harness
from twotower.integrations import drift
from twotower.integrations.embedding_history import BLOCK, EmbeddingHistory, Version
from twotower.integrations.redis_store import CachedRetriever, RedisStore
from twotower.retrieval.retriever import Retriever

_REDIS = flags.DEFINE_string("redis", "", "A server to measure.")
_WORKDIR = flags.DEFINE_string("workdir", "", "A run whose bundle is asked, with --redis.")
WIDTH = 64


def main(argv: list[str]) -> None:
    rows = 100_000 if harness.QUICK.value else 1_000_000
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(rows, WIDTH)).astype(np.float32)
    moved = vectors + draw.normal(scale=0.3, size=vectors.shape).astype(np.float32)
    ids = pa.array([f"item-{n}" for n in range(rows)])
    with tempfile.TemporaryDirectory() as folder:
        history = EmbeddingHistory(folder)
        version = Version(
            run_date=datetime.date(2026, 11, 25), run_id="a", experiment_id="e", model_version="m"
        )
        blocks = [
            (ids.slice(start, BLOCK), vectors[start : start + BLOCK])
            for start in range(0, rows, BLOCK)
        ]
        runs = {
            "numpy.save": lambda: np.save(Path(folder) / "vectors.npy", vectors),
            "append": lambda: history.append(version, {"item": blocks}),
            "read": lambda: history.read(history.find("item", version.name)),
            "drift": lambda: drift.compare(
                history.read(history.find("item", version.name)), (pa.chunked_array([ids]), moved)
            ),
        }
        times = harness.alternate(runs, rounds=2, repeats=1)
        size = history.find("item", version.name).path.stat().st_size
        print(f"{size / 1e6:.0f} MB of Parquet for {vectors.nbytes / 1e6:.0f} MB of vectors.")
    harness.report("history", times, unit=f"ms for {rows:,} vectors", base="append")
    if _REDIS.value:
        redis(ids, vectors)


def redis(ids: pa.Array, vectors: np.ndarray) -> None:
    """One question by the retriever and by the cache, and vectors published and found."""
    store = RedisStore(_REDIS.value, name="benchmark", timeout=1.0)
    retriever = Retriever.load(Path(_WORKDIR.value) / "bundle")
    cached = CachedRetriever(retriever, store, ttl=600)
    user, some, names = (
        retriever.bundle.users["user_id"][0].as_py(),
        ids.slice(0, 20_000),
        ids.slice(0, 100).to_pylist(),
    )
    block = (some, vectors[: len(some)])
    publish = harness.alternate(
        {"a vector": lambda: store.publish("v", {"item": [block]}, ttl=600)}, rounds=3, repeats=1
    )
    runs = {
        "recommend": lambda: retriever.recommend(user, k=10),
        "recommend, cached": lambda: cached.recommend(user, k=10),
        "100 vectors": lambda: store.vectors("item", names),
    }
    times = harness.alternate(runs, rounds=10, repeats=100)
    times["publish a vector"] = [t / len(some) for t in publish["a vector"]]
    harness.table("redis", times, unit="ms", base="recommend")


if __name__ == "__main__":
    app.run(main)
