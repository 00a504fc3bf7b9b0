"""Do answers stay right, and are changes kept, while items change under four threads, and through a
kill?

    python -m experiments.benchmarks.live [--operations=100000] [--items=20000] [--quick]

A bundle of drawn vectors is written to a temporary folder. A process serves it: four threads, each
a fifth upserts, a tenth deletes and the rest queries, on ids of their own. A query for a thread's
own item must find it if and only if it is alive, and no answer may hold an item of the thread's
that is gone, or one twice. The process is killed, and what was acknowledged must all be there when
the bundle is loaded anew; then it runs to the end. Prints what was wrong, which should be nothing,
and the times.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from absl import app, flags

from experiments.benchmarks import harness

if TYPE_CHECKING:
    from twotower.retrieval.retriever import Retriever

_OPERATIONS = flags.DEFINE_integer("operations", 100_000, "Upserts, deletes and queries in all.")
_ITEMS = flags.DEFINE_integer("items", 20_000, "Items to begin with.")
_SERVE = flags.DEFINE_string(
    "serve", "", "The folder of the bundle: run the threads (used by this program itself)."
)
THREADS, DIM, OWN = 4, 64, 500  # threads, width, ids of each thread


def make_bundle(folder: Path, items: int) -> None:
    """A bundle of random vectors, with towers that were never trained."""
    import dataclasses

    import jax

    from twotower.config import from_dict
    from twotower.core.arrays import Ragged
    from twotower.index.build import index_items
    from twotower.pipeline.prepare import prepare
    from twotower.retrieval.bundle import write_bundle
    from twotower.retrieval.export import make_bundle as make
    from twotower.towers.two_tower import TwoTower
    from twotower.training.run import Run

    features = {
        side: {f"{side}_id": {"type": "string", "embedding_size": DIM}} for side in ("user", "item")
    }
    config = from_dict({"data": {"source": "shop", "num_interactions": 2000}, "features": features})
    prepared = prepare(config)
    model = TwoTower.build(config.model, prepared.encoder)
    bundle = make(Run(folder, config, prepared, model, model.init(jax.random.key(0)), 0))
    vectors = np.random.default_rng(0).normal(size=(items, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    counts = np.zeros(items, np.int64)
    table = pa.table({"item_id": [f"item{n}" for n in range(items)]})
    bundle = dataclasses.replace(
        bundle,
        vectors=vectors,
        items=table,
        counts=counts,
        seen=Ragged.empty(len(bundle.users)),
        index=index_items(config, vectors, counts, bundle.user_vectors),
    )
    folder.mkdir(parents=True)
    write_bundle(bundle, folder, step=0)


def own_vector(thread: int, number: int, generation: int) -> np.ndarray:
    vector = np.random.default_rng((thread, number, generation)).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Client:
    """A thread that changes and queries items of its own, and checks what it is answered.

    Attributes:
        failures: What was answered wrongly, as text.
        seconds: Kind of operation -> seconds of each.
    """

    def __init__(self, retriever: Retriever, number: int, lock: threading.Lock) -> None:
        self.failures: list[str] = []
        self.seconds: dict[str, list[float]] = {"upsert": [], "delete": [], "query": []}
        self._retriever = retriever
        self._number = number
        self._lock = lock
        self._alive: dict[int, int] = {}  # item -> step at which it was upserted last

    def run(self, steps: int) -> None:
        """Does so many operations, and prints each change when it is acknowledged."""
        rng = np.random.default_rng(self._number)
        for step in range(steps):
            share = rng.random()
            item = int(rng.integers(OWN))
            kind = "upsert" if share < 0.2 else "delete" if share < 0.3 else "query"
            start = time.perf_counter()
            getattr(self, f"_{kind}")(item, step)
            self.seconds[kind].append(time.perf_counter() - start)
            if kind != "query":
                with self._lock:
                    print(json.dumps([self._number, kind, item, step]), flush=True)

    def _upsert(self, item: int, step: int) -> None:
        vector = own_vector(self._number, item, step)
        rows = pa.table({"item_id": [self._name(item)]})
        self._retriever.upsert(rows, vectors=vector[None])
        self._alive[item] = step

    def _delete(self, item: int, step: int) -> None:
        del step
        name = self._name(item)
        if self._retriever.delete([name]) != (item in self._alive):
            self.failures.append(f"delete of {name}")
        self._alive.pop(item, None)

    def _query(self, item: int, step: int) -> None:
        del step
        name = self._name(item)
        snapshot = self._retriever._live.catalogue.snapshot
        vector = own_vector(self._number, item, self._alive.get(item, 0))
        scores, positions = snapshot.search(vector[None], 10)
        ids = snapshot.item_ids(positions[0][positions[0] >= 0]).to_pylist()
        is_alive = item in self._alive
        if (name in ids[:1] and scores[0, 0] > 0.9999) != is_alive:
            answer = f"{ids[:2]} {scores[0, :2]}"
            self.failures.append(f"query of {name}: {answer}, alive {is_alive}")
        own = {i for i in ids if i.startswith(self._name(""))}
        if own - set(map(self._name, self._alive)) or len(set(ids)) < 10:
            self.failures.append(f"{ids} holds what is gone, or an item twice")

    def _name(self, item: int | str) -> str:
        return f"t{self._number}_{item}"


def serve(folder: Path, operations: int) -> None:
    """Runs the threads; prints a line of JSON for each acknowledged change, and one with the
    failures at the end."""
    from twotower.retrieval.retriever import Retriever

    retriever = Retriever.load(folder)
    lock = threading.Lock()
    clients = [Client(retriever, number, lock) for number in range(THREADS)]
    steps = operations // THREADS
    threads = [threading.Thread(target=client.run, args=(steps,)) for client in clients]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        if retriever._live.catalogue.snapshot.num_slots > 4_000:  # as a server would, now and then
            retriever.rebalance()
    failures = [failure for client in clients for failure in client.failures]
    milliseconds = {}
    for kind in ("upsert", "delete", "query"):
        times = [1e3 * t for client in clients for t in client.seconds[kind]]
        if times:
            milliseconds[kind] = [round(float(np.percentile(times, p)), 3) for p in (50, 99)]
    shown = {"failures": failures[:5], "count": len(failures), "p50 and p99 ms": milliseconds}
    print(json.dumps(shown), flush=True)


def check(folder: Path, lines: list[list]) -> list[str]:
    """Returns the acknowledged changes that the bundle, loaded anew, does not hold."""
    from twotower.retrieval.retriever import Retriever

    retriever, last = Retriever.load(folder), {}
    for thread, kind, number, generation in lines:
        last[thread, number] = (kind, generation)
    wrong, corpus = [], retriever._live.catalogue
    for (thread, number), (kind, generation) in last.items():
        known = corpus.numbers.get(f"t{thread}_{number}", -1)
        position = corpus.snapshot.position_of(known) if known >= 0 else -1
        # What was under way at the kill may have been made: at most one change a thread.
        if (position >= 0) != (kind == "upsert") or (
            position >= 0
            and not np.allclose(
                corpus.snapshot.vector(position), own_vector(thread, number, generation)
            )
        ):
            wrong.append(f"t{thread}_{number}: {kind} of {generation}")
    return wrong


def main(argv: list[str]) -> None:
    operations = 2_000 if harness.QUICK.value else _OPERATIONS.value
    if _SERVE.value:
        serve(Path(_SERVE.value), operations)
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "bundle"
        make_bundle(folder, 2_000 if harness.QUICK.value else _ITEMS.value)
        command = [
            sys.executable,
            "-m",
            "experiments.benchmarks.live",
            f"--serve={folder}",
            f"--operations={operations}",
        ]
        start = time.perf_counter()
        killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert killed.stdout
        lines = []
        for line in killed.stdout:
            lines.append(json.loads(line))
            if len(lines) > 0.1 * operations:
                os.kill(killed.pid, signal.SIGKILL)
                break
        # The last line may have been cut off.
        whole = [line for line in killed.stdout.read().splitlines() if line.endswith("]")]
        lines += map(json.loads, whole)
        killed.wait()
        wrong = check(folder, lines)
        print(
            f"Killed after {len(lines):,} acknowledged changes, {len(wrong)} differ; "
            f"one a thread may have been under way {wrong[:5]}"
        )
        for path in Path(parent).rglob("*.changes"):
            path.unlink()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        spent = f"{time.perf_counter() - start:.0f} s with the killed part"
        print(f"{operations:,} operations by {THREADS} threads in {spent}:")
        print(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    app.run(main)
