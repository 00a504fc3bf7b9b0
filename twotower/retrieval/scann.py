"""Indexes over the item vectors, chosen by `RetrievalConfig.index`: exact, or ScaNN tuned to a recall target.

ScaNN ends the process on vectors that are not finite, and pads its answers with row 0: everything that goes in and
comes out is checked here. It has no wheel for every platform; where it cannot be imported, "auto" means exact search.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from twotower.config import RetrievalConfig
from twotower.retrieval.embed import evenly_spaced
from twotower.retrieval.exact import ExactIndex, check_k, check_queries, check_vectors
from twotower.retrieval.scann_library import (
    BadIndexError,
    build_searcher,
    import_scann,
    load_searcher,
    save_searcher,
    scann_version,
)
from twotower.validation import ConfigError, choose

SMALLEST_TREE = 1_000  # vectors; below it ScaNN cannot always train a tree, and has nothing to gain
BRUTE_FORCE_BELOW = 50_000  # vectors; exact, and within a fraction of a millisecond
HASHING_FROM = 200_000  # vectors; from here asymmetric hashing beats comparing whole vectors in the leaves
TUNED_K = 10
TUNING_QUERIES = 500
REORDER = (100, 200, 400, 800)  # candidates scored anew with whole vectors, tried in this order
KINDS = {
    "auto": "what suits the number of vectors and the platform",
    "exact": "exhaustive search by JAX",
    "scann_brute_force": "exhaustive search by ScaNN",
    "scann_tree": "ScaNN: a tree, whole vectors compared in the leaves",
    "scann_tree_ah": "ScaNN: a tree, 4-bit codes compared in the leaves, the best scored anew; normalised vectors only",
}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a ScaNN index is searched, and what that was measured to find.

    Attributes:
        kind: a key of `KINDS`.
        num_items, dim: of the vectors.
        normalized: the vectors have length 1, so that a query of length 0 is a mistake.
        num_leaves: of the tree; 0 without one.
        leaves_to_search: for each query.
        reorder: candidates scored anew with whole vectors; 0 without hashing.
        target_recall: of the exact top 10.
        measured_recall: mean share of the exact top 10 that was found by `measured_on` query vectors.
    """

    kind: str
    num_items: int
    dim: int
    normalized: bool = False
    num_leaves: int = 0
    leaves_to_search: int = 0
    reorder: int = 0
    target_recall: float = 1.0
    measured_recall: float = 1.0
    measured_on: int = 0


def build_index(vectors: Any, config: RetrievalConfig, *, normalized: bool, queries: Any = None) -> Any:
    """The index `config.index` over `vectors`.

    Args:
        vectors: float [N, D], finite.
        config: the kind and the recall it must reach.
        normalized: the vectors have length 1.
        queries: float [Q, D] user vectors to tune on, at most 500 of which are used; without any, items are used.

    Returns:
        An `ExactIndex` or a `ScannIndex`.

    Raises:
        ConfigError: the kind is unknown, or unfit for vectors that are not normalised.
        ImportError: ScaNN was asked for by name and cannot be imported.
    """
    choose(KINDS, config.index, "config.retrieval.index")
    vectors = check_vectors(vectors, what="item")
    kind = _kind(config.index, len(vectors), normalized)
    if kind == "exact":
        return ExactIndex(vectors, normalized=normalized)
    queries = vectors if queries is None or not len(queries) else queries
    return ScannIndex.build(
        vectors, kind=kind, queries=queries, target_recall=config.target_recall, normalized=normalized
    )


def load_index(folder: str | os.PathLike, vectors: np.ndarray, *, normalized: bool) -> Any:
    """The index that `save_index` wrote in `folder`, for `vectors` [N, D]."""
    info = json.loads((Path(folder) / "index.json").read_text())
    if (info["num_items"], info["dim"]) != vectors.shape:
        raise BadIndexError(
            f"{folder} indexes {info['num_items']} vectors {info['dim']} wide, not {list(vectors.shape)}."
        )
    if info["kind"] == "exact":
        return ExactIndex(vectors, normalized=normalized)
    try:
        return ScannIndex.load(folder, normalized=normalized)
    except ImportError as error:
        logging.warning("Exact search instead of %s: %s", info["kind"], error)
        return ExactIndex(vectors, normalized=normalized)


def save_index(index: Any, folder: str | os.PathLike, **more: Any) -> None:
    """Writes `index` and, in index.json, its settings and what else is given."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(index, ScannIndex):
        index.save(folder)
        info = dataclasses.asdict(index.tuning) | {"scann_version": scann_version()}
    else:
        info = {"kind": "exact", "num_items": index.num_items, "dim": index.dim}
    (folder / "index.json").write_text(json.dumps(info | more, indent=2, sort_keys=True) + "\n")


class ScannIndex:
    """A ScaNN searcher with the meaning of `ExactIndex.search`: rows of -1 and scores of -inf pad short lists."""

    def __init__(self, searcher: Any, tuning: Tuning):
        self._searcher, self.tuning = searcher, tuning
        self.kind, self.num_items, self.dim = tuning.kind, tuning.num_items, tuning.dim

    @classmethod
    def build(
        cls, vectors: Any, *, kind: str, queries: Any, target_recall: float, normalized: bool = False
    ) -> ScannIndex:
        """Builds the searcher (the same each time) and searches as few leaves as reach `target_recall`."""
        vectors = check_vectors(vectors, what="item")
        num_items, dim = vectors.shape
        if kind != "scann_brute_force" and num_items < SMALLEST_TREE:
            logging.warning("%s needs %d vectors; %d are searched by brute force.", kind, SMALLEST_TREE, num_items)
            kind = "scann_brute_force"
        leaves = 0 if kind == "scann_brute_force" else round(math.sqrt(num_items))
        tuning = Tuning(
            kind=kind,
            num_items=num_items,
            dim=dim,
            normalized=normalized,
            num_leaves=leaves,
            leaves_to_search=leaves,
            target_recall=target_recall,
        )
        reorder = max(REORDER) if kind == "scann_tree_ah" else 0
        index = cls(build_searcher(vectors, num_leaves=leaves, reorder=reorder), tuning)
        queries = check_queries(queries, dim)
        queries = queries[queries.any(axis=1)]  # one of length 0 has no best items that could be found
        index._tune(vectors, evenly_spaced(queries, TUNING_QUERIES))
        return index

    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The (nearly) best items, best first.

        Args:
            queries: float [Q, D], finite.
            k: length of the lists.

        Returns:
            (scores float32 [Q, k], rows int32 [Q, k]); score -inf and row -1 where fewer than k were found.

        Raises:
            QueryError: as `ExactIndex.search`.
        """
        queries = check_queries(queries, self.dim, normalized=self.tuning.normalized)
        check_k(k)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int32)
        if len(queries):
            found, distances = self._search(queries, min(k, self.num_items))
            # ScaNN fills short lists with row 0 at distance NaN.
            missing = np.isnan(distances)
            rows[:, : found.shape[1]] = np.where(missing, -1, found.astype(np.int32))
            scores[:, : found.shape[1]] = np.where(missing, -np.inf, distances)
        return scores, rows

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        tuning, options = self.tuning, {"final_num_neighbors": k}
        if tuning.num_leaves:
            # Tuned for lists of ten: longer ones need leaves that hold several times k items.
            enough = math.ceil(4 * k * tuning.num_leaves / tuning.num_items)
            options["leaves_to_search"] = min(tuning.num_leaves, max(tuning.leaves_to_search, enough))
        if tuning.reorder:
            options["pre_reorder_num_neighbors"] = min(self.num_items, max(tuning.reorder, 4 * k))
        search = self._searcher.search_batched_parallel if len(queries) >= 256 else self._searcher.search_batched
        return search(queries, **options)

    def _tune(self, vectors: np.ndarray, queries: np.ndarray) -> None:
        """Finds the fewest leaves (and, with hashing, candidates) whose recall on `queries` reaches the target."""
        if not self.tuning.num_leaves or not len(queries):
            return
        truth = ExactIndex(vectors).search(queries, min(TUNED_K, self.num_items))[1]
        for reorder in REORDER if self.kind == "scann_tree_ah" else (0,):
            self.tuning = dataclasses.replace(self.tuning, reorder=reorder, leaves_to_search=self.tuning.num_leaves)
            if self._measure(queries, truth, self.tuning.num_leaves) >= self.tuning.target_recall:
                break
        leaves = self._fewest_leaves(queries, truth)
        measured = self._measure(queries, truth, leaves)
        self.tuning = dataclasses.replace(
            self.tuning, leaves_to_search=leaves, measured_recall=round(measured, 4), measured_on=len(queries)
        )
        log = logging.info if measured >= self.tuning.target_recall else logging.warning
        log("%s searches %d of %d leaves: recall@%d %.4f, target %.4f", self.kind, leaves, self.tuning.num_leaves,
            TUNED_K, measured, self.tuning.target_recall)  # fmt: skip

    def _fewest_leaves(self, queries: np.ndarray, truth: np.ndarray) -> int:
        """Doubles until the target is reached, then bisects: recall rises with the leaves."""

        def reached(leaves: int) -> bool:
            return self._measure(queries, truth, leaves) >= self.tuning.target_recall

        high = 1
        while high < self.tuning.num_leaves and not reached(high):
            high *= 2
        low, high = high // 2, min(high, self.tuning.num_leaves)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high

    def _measure(self, queries: np.ndarray, truth: np.ndarray, leaves: int) -> float:
        trial = ScannIndex(self._searcher, dataclasses.replace(self.tuning, leaves_to_search=leaves))
        return overlap(trial.search(queries, truth.shape[1])[1], truth)

    def save(self, folder: str | os.PathLike) -> None:
        save_searcher(self._searcher, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, normalized: bool) -> ScannIndex:
        """The index that `save_index` wrote; `normalized` is for one written before that stood in index.json."""
        info = {"normalized": normalized} | json.loads((Path(folder) / "index.json").read_text())
        tuning = Tuning(**{field.name: info[field.name] for field in dataclasses.fields(Tuning)})
        return cls(load_searcher(folder), tuning)


def overlap(rows: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of each row of `truth` [Q, K] that stands in the same row of `rows` [Q, K]."""
    return float((truth[:, :, None] == rows[:, None, :]).any(-1).mean()) if truth.size else 1.0


def _kind(index: str, num_items: int, normalized: bool) -> str:
    if index == "scann_tree_ah" and not normalized:
        raise ConfigError(
            "config.retrieval.index='scann_tree_ah' loses recall on vectors that are not normalised (measured: 0.87). "
            "Use 'scann_tree', or model.normalize=True."
        )
    if index != "auto":
        return index
    if num_items < SMALLEST_TREE or not _has_scann():
        return "exact"
    if num_items < BRUTE_FORCE_BELOW:
        return "scann_brute_force"
    return "scann_tree_ah" if num_items >= HASHING_FROM and normalized else "scann_tree"


def _has_scann() -> bool:
    try:
        import_scann()
    except ImportError as error:
        logging.info("Exact search: %s", error)
        return False
    return True
