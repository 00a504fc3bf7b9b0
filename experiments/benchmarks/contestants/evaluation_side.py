"""One evaluation of given vectors by one library, in a process of its own: its processor time and
its greatest memory.

    python -m experiments.benchmarks.contestants.evaluation_side SIDE DATA.npz '[10, 50, 100]'

SIDE is "twotower", "intervals" (twotower with the intervals of all figures), "rectools", "ranx" or
"tensorflow" (the FactorizedTopK of TensorFlow Recommenders). The data holds user and item
vectors, and the lists of seen and of relevant items as offsets and values. A line of JSON is
printed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Figures = dict[str, float]
# Users that ranx holds the lists of at once: a pair takes it about 700 bytes, so that all of
# Yelp2018's to K = 1,000 would take 22 GB.
RANX_USERS = 4_096


def twotower(data: Any, ks: Sequence[int]) -> Callable[[], Figures]:
    """Both protocols, with the seen items masked and without, of one product."""
    return _ours(data, ks, with_intervals=False)


def intervals(data: Any, ks: Sequence[int]) -> Callable[[], Figures]:
    """The same with the intervals of every figure, of both protocols."""
    return _ours(data, ks, with_intervals=True)


def _ours(data: Any, ks: Sequence[int], *, with_intervals: bool) -> Callable[[], Figures]:
    from twotower.core.arrays import Ragged
    from twotower.evaluation.evaluate import dot_scores, evaluate_both
    from twotower.evaluation.intervals import interval_table
    from twotower.evaluation.queries import Queries

    num_queries = len(data["users"])
    queries = Queries(
        user=np.arange(num_queries),
        relevant=Ragged(data["relevant_offsets"], data["relevant_values"]),
        missing=np.zeros(num_queries, np.int32),
        seen=Ragged(data["seen_offsets"], data["seen_values"]),
        counts=np.bincount(data["seen_values"], minlength=len(data["items"])),
    )
    scores = dot_scores(data["users"], data["items"])

    def run() -> Figures:
        both = evaluate_both(scores, queries, ks)
        if with_intervals:
            for evaluation in both:
                interval_table(evaluation.resampled, queries.user, evaluation.is_averaged)
        return both[0].figures

    return run


def rectools(data: Any, ks: Sequence[int]) -> Callable[[], Figures]:
    """Its ranker, and its metrics of the same names; both protocols, one after the other."""
    import pandas as pd
    from rectools import metrics
    from rectools.models.rank import Distance, ImplicitRanker
    from scipy.sparse import csr_matrix

    users = data["users"]
    items = data["items"]
    ones = np.ones(len(data["seen_values"]), np.float32)
    shape = (len(users), len(items))
    seen = csr_matrix((ones, data["seen_values"], data["seen_offsets"]), shape=shape)
    relevant = _pairs(data, "relevant")
    before = _pairs(data, "seen")
    kinds = {
        "recall": metrics.Recall,
        "precision": metrics.Precision,
        "hit_rate": metrics.HitRate,
        "ndcg": metrics.NDCG,
        "mrr": metrics.MRR,
        "map": metrics.MAP,
        "novelty": metrics.MeanInvUserFreq,
        "coverage": metrics.CatalogCoverage,
    }
    asked = {f"{name}@{k}": kind(k=k) for k in ks for name, kind in kinds.items()}

    def measure(mask: csr_matrix | None) -> Figures:
        ranker = ImplicitRanker(Distance.DOT, users, items, num_threads=1)
        rows, best, scores = ranker.rank(np.arange(len(users)), max(ks), filter_pairs_csr=mask)
        lists = pd.DataFrame({"user_id": rows, "item_id": best, "score": scores})
        lists["rank"] = lists.groupby("user_id", sort=False).cumcount() + 1
        catalogue = np.arange(len(items))
        return metrics.calc_metrics(asked, lists, relevant, before, catalogue)

    def run() -> Figures:
        measure(None)
        return measure(seen)

    return run


def ranx(data: Any, ks: Sequence[int]) -> Callable[[], Figures]:
    """Its metrics alone, of lists that NumPy makes: it ranks nothing itself. Both protocols."""
    import pandas as pd
    from ranx import Qrels, Run, evaluate

    num_users = len(data["users"])
    names = {"recall": "recall", "precision": "precision", "hit_rate": "hit_rate"}
    names |= {"ndcg": "ndcg", "mrr": "mrr", "map": "map"}
    asked = [f"{name}@{k}" for k in ks for name in names.values()]
    pairs = _pairs(data, "relevant")
    ends = data["relevant_offsets"]

    def measure_some(some: range, *, mask_seen: bool) -> tuple[Figures, int]:
        parts = []
        for start in some[::256]:
            block = slice(start, min(start + 256, some.stop))
            best, scores = _best_items(data, block, max(ks), mask_seen=mask_seen)
            rows = np.repeat(np.arange(block.start, block.stop), max(ks))
            columns = {
                "user_id": rows,
                "item_id": best.ravel(),
                "score": scores.ravel().astype(float),
            }
            parts.append(pd.DataFrame(columns))
        here = pairs[ends[some.start] : ends[some.stop]].assign(score=1)
        relevant = Qrels.from_df(_as_text(here), q_id_col="user_id", doc_id_col="item_id")
        found = Run.from_df(_as_text(pd.concat(parts)), q_id_col="user_id", doc_id_col="item_id")
        asked_here = here["user_id"].nunique()
        return evaluate(relevant, found, asked, make_comparable=True), asked_here

    def measure(*, mask_seen: bool) -> Figures:
        total = dict.fromkeys(asked, 0.0)
        asked_users = 0
        for start in range(0, num_users, RANX_USERS):
            some = range(start, min(start + RANX_USERS, num_users))
            figures, count = measure_some(some, mask_seen=mask_seen)
            asked_users += count
            for name, value in figures.items():
                total[name] += value * count
        return {name: value / asked_users for name, value in total.items()}

    def run() -> Figures:
        measure(mask_seen=False)
        return measure(mask_seen=True)

    return run


def _best_items(
    data: Any, block: slice, k: int, *, mask_seen: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best items of a block of users, in no order, and their scores, [b, k] each."""
    scores = data["users"][block] @ data["items"].T
    if mask_seen:
        offsets = data["seen_offsets"][block.start : block.stop + 1]
        rows = np.repeat(np.arange(len(scores)), np.diff(offsets))
        scores[rows, data["seen_values"][offsets[0] : offsets[-1]]] = -np.inf
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    return best, np.take_along_axis(scores, best, axis=1)


def _as_text(frame: Any) -> Any:
    """Returns pairs with their ids as text, which ranx asks for."""
    ids = {name: frame[name].astype(str).astype(object) for name in ("user_id", "item_id")}
    return frame.assign(**ids)


def tensorflow(data: Any, ks: Sequence[int]) -> Callable[[], Figures]:
    """FactorizedTopK: the share of held-out pairs in the lists, without masking; it has no other
    metric, and measures this one protocol."""
    import tensorflow as tf
    import tensorflow_recommenders as tfrs

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # Of each held-out row the vectors of its user and of its item.
    lengths = np.diff(data["relevant_offsets"])
    users = np.repeat(data["users"], lengths, axis=0)
    items = data["items"][data["relevant_values"]]

    def run() -> Figures:
        candidates = tf.data.Dataset.from_tensor_slices(data["items"]).batch(4096)
        metric = tfrs.metrics.FactorizedTopK(candidates=candidates, ks=list(ks))
        for start in range(0, len(users), 2048):
            block = slice(start, start + 2048)
            metric.update_state(users[block], items[block])
        values = [float(value) for value in metric.result()]
        return {f"pairs@{k}": value for k, value in zip(ks, values)}

    return run


def _pairs(data: Any, name: str) -> Any:
    """Returns lists as a frame of pairs."""
    import pandas as pd

    offsets = data[f"{name}_offsets"]
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return pd.DataFrame({"user_id": users, "item_id": data[f"{name}_values"]})


SIDES = {
    "twotower": twotower,
    "intervals": intervals,
    "rectools": rectools,
    "ranx": ranx,
    "tensorflow": tensorflow,
}


def main(argv: Sequence[str]) -> None:
    side, path, ks = argv
    with np.load(path) as file:
        data = dict(file)
    run = SIDES[side](data, json.loads(ks))
    start = time.process_time()
    figures = run()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "figures": figures}))


if __name__ == "__main__":
    main(sys.argv[1:])
