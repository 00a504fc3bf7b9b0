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

import numpy as np
import pyarrow as pa
from absl import app, flags

from experiments.benchmarks import harness

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
    from twotower.core.ragged import Ragged
    from twotower.index.popularity import index_items
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


def serve(folder: Path, operations: int) -> None:
    """Runs the threads; a line of JSON for each acknowledged change, and one with the failures at
    the end."""
    from twotower.retrieval.retriever import Retriever

    retriever, failures, times, lock = (
        Retriever.load(folder),
        [],
        {"upsert": [], "delete": [], "query": []},
        threading.Lock(),
    )

    def work(thread: int) -> None:
        rng, alive = np.random.default_rng(thread), {}
        for step in range(operations // THREADS):
            kind, number = rng.random(), int(rng.integers(OWN))
            name, start = f"t{thread}_{number}", time.perf_counter()
            if kind < 0.2:
                retriever.upsert(
                    pa.table({"item_id": [name]}), vectors=own_vector(thread, number, step)[None]
                )
                alive[number], done = step, ("upsert", number, step)
            elif kind < 0.3:
                if retriever.delete([name]) != (number in alive):
                    failures.append(f"delete of {name}")
                alive.pop(number, None)
                done = ("delete", number, step)
            else:
                done = ("query", number, step)
                generation = alive.get(number, 0)
                snapshot = retriever._live.catalogue.snapshot
                scores, positions = snapshot.search(
                    own_vector(thread, number, generation)[None], 10
                )
                ids = snapshot.item_ids(positions[0][positions[0] >= 0]).to_pylist()
                if (name in ids[:1] and scores[0, 0] > 0.9999) != (number in alive):
                    failures.append(
                        f"query of {name}: {ids[:2]} {scores[0, :2]}, alive {number in alive}"
                    )
                mine = {f"t{thread}_{n}" for n in alive}
                if (
                    any(i.startswith(f"t{thread}_") and i not in mine for i in ids)
                    or len(set(ids)) < 10
                ):
                    failures.append(f"{ids} holds what is gone, or an item twice")
            times[done[0]].append(time.perf_counter() - start)
            if done[0] != "query":
                with lock:
                    print(json.dumps([thread, *done]), flush=True)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        if retriever._live.catalogue.snapshot.num_slots > 4_000:  # as a server would, now and then
            retriever.rebalance()
    milliseconds = {
        kind: [round(1e3 * float(np.percentile(t, p)), 3) for p in (50, 99)]
        for kind, t in times.items()
        if t
    }
    print(
        json.dumps(
            {"failures": failures[:5], "count": len(failures), "p50 and p99 ms": milliseconds}
        ),
        flush=True,
    )


def check(folder: Path, lines: list[list]) -> list[str]:
    """What of the acknowledged changes is not in the bundle as it is loaded anew."""
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
        lines = []
        for line in killed.stdout:
            lines.append(json.loads(line))
            if len(lines) > 0.1 * operations:
                os.kill(killed.pid, signal.SIGKILL)
                break
        lines += [
            json.loads(line) for line in killed.stdout.read().splitlines() if line.endswith("]")
        ]
        killed.wait()
        wrong = check(folder, lines)
        print(
            f"Killed after {len(lines):,} acknowledged changes, {len(wrong)} differ; one a thread may have been under "
            f"way {wrong[:5]}"
        )
        for path in Path(parent).rglob("*.changes"):
            path.unlink()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(
            f"{operations:,} operations by {THREADS} threads in {time.perf_counter() - start:.0f} s with the killed part:"
        )
        print(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    app.run(main)
