"""Indexes over the item vectors, chosen by `RetrievalConfig.index`: exact, or ScaNN tuned to a
recall target.

ScaNN ends the process on vectors that are not finite, answers short queries of codes at random, and
pads its answers with row 0: everything that goes in and comes out is checked here. It has no wheel
for every platform; where it cannot be imported, "auto" means exact search, and hnswlib and FAISS
can be asked for (`twotower.index.graphs`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from twotower.config import RetrievalConfig
from twotower.core.errors import BadIndexError, ConfigError, choose
from twotower.index import tuning as tuner
from twotower.index.base import check_k, check_queries, check_vectors
from twotower.index.exact import ExactIndex
from twotower.index.graphs import GRAPHS, GraphIndex
from twotower.index.int8 import Vectors
from twotower.index.scann_library import (
    build_searcher,
    import_scann,
    load_searcher,
    save_searcher,
    scann_version,
)
from twotower.index.tuned import Tuning
from twotower.index.tuning import Problem

SMALLEST_TREE = 1_000  # vectors; below it ScaNN cannot always train a tree, and has nothing to gain
BRUTE_FORCE_BELOW = (
    50_000 * 64
)  # numbers in all vectors; exact, and within a fraction of a millisecond
HASHING_FROM = (
    200_000  # vectors; from here asymmetric hashing beats comparing whole vectors in the leaves
)
# Leaves for each of sqrt(N). Measured at 200,000 learned vectors: 1 and 2 look at 1.5 to 3 times
# the items for one recall, and 8 spend more time on choosing leaves than they save within them.
LEAVES_PER_ROOT = 3
# Length below which queries of codes are lengthened: ScaNN rounds what a code adds to a score to a
# step that does not shrink with the query. Measured: right at 1e-3, arbitrary items without a word
# from 1e-4 down.
SHORT = 0.1
SHARE_OF_CORPUS = 20  # a list of more than one in so many items is found by looking at all of them
KINDS = {
    "auto": "what suits the number, width and length of vectors, the lists asked for, and the platform",
    "exact": "exhaustive search by JAX",
    "scann_brute_force": "exhaustive search by ScaNN",
    "scann_tree": "ScaNN: a tree, whole vectors compared in the leaves; the fastest where queries come in hundreds",
    "scann_tree_ah": "ScaNN: a tree, 4-bit codes compared in the leaves, the best scored anew; the fastest for single queries of "
    "large catalogues; normalised vectors only",
    "hnswlib": "a graph, by hnswlib",
    "faiss": "a graph, by FAISS",
}


def build_index(
    vectors: Any,
    config: RetrievalConfig,
    *,
    normalized: bool,
    queries: Any = None,
    popularity: np.ndarray | None = None,
) -> Any:
    """The index `config.index` over `vectors`.

    Args:
        vectors: float [N, D], finite.
        config: the kind and the recall it must reach.
        normalized: the vectors have length 1.
        queries: float [Q, D] user vectors to tune on; at most 2,000 are used. Without any, items
            are.
        popularity: [N], for the recall of each of its deciles.

    Returns:
        An `ExactIndex`, a `ScannIndex` or a `GraphIndex`.

    Raises:
        ConfigError: the kind is unknown, or unfit for vectors that are not normalised.
        ImportError: a library was asked for by name and cannot be imported.
    """
    choose(KINDS, config.index, "config.retrieval.index")
    vectors = check_vectors(vectors, what="item")
    kind = _kind(config, *vectors.shape, normalized)
    if kind == "exact":
        return ExactIndex(vectors, normalized=normalized)
    queries = vectors if queries is None or not len(queries) else queries
    if kind in GRAPHS:
        tuning = Tuning(kind, *vectors.shape, normalized, target_recall=config.target_recall)
        return GraphIndex.build(vectors, tuning, queries=queries, k=config.k, popularity=popularity)
    return ScannIndex.build(
        vectors,
        kind=kind,
        queries=queries,
        target_recall=config.target_recall,
        k=config.k,
        normalized=normalized,
        popularity=popularity,
    )


def load_index(folder: str | os.PathLike, vectors: Vectors) -> Any:
    """The index that `save_index` wrote in `folder`, for `vectors` [N, D]."""
    info = json.loads((Path(folder) / "index.json").read_text())
    if (info["num_items"], info["dim"]) != vectors.shape:
        raise BadIndexError(
            f"{folder} indexes {info['num_items']} vectors {info['dim']} wide, not {list(vectors.shape)}."
        )
    if info["kind"] == "exact":
        return ExactIndex(vectors, normalized=info["normalized"])
    try:
        load = GraphIndex.load if info["kind"] in GRAPHS else ScannIndex.load
        return load(folder, Tuning.of(info))
    except ImportError as error:
        logging.warning("Exact search instead of %s: %s", info["kind"], error)
        return ExactIndex(vectors, normalized=info["normalized"])


def save_index(index: Any, folder: str | os.PathLike, **more: Any) -> None:
    """Writes `index` and, in index.json, its settings, what was tried for it, and what else is
    given."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(index, (ScannIndex, GraphIndex)):
        index.save(folder)
        info = dataclasses.asdict(index.tuning)
        if isinstance(index, ScannIndex):
            info["scann_version"] = scann_version()
    else:
        info = {
            "kind": "exact",
            "num_items": index.num_items,
            "dim": index.dim,
            "normalized": index.normalized,
        }
    (folder / "index.json").write_text(json.dumps(info | more, indent=2, sort_keys=True) + "\n")


class ScannIndex:
    """A ScaNN searcher with the meaning of `ExactIndex.search`: rows of -1 and scores of -inf pad
    short lists."""

    def __init__(self, searcher: Any, tuning: Tuning):
        self._searcher = searcher
        self._searched_as(tuning)
        self.kind, self.num_items, self.dim = tuning.kind, tuning.num_items, tuning.dim
        self.normalized = tuning.normalized

    @classmethod
    def build(
        cls,
        vectors: Any,
        *,
        kind: str,
        queries: Any,
        target_recall: float,
        k: int = 10,
        normalized: bool = False,
        popularity: np.ndarray | None = None,
    ) -> ScannIndex:
        """Builds the searcher (the same each time) and finds how hard it must search; see
        `tuning.tune`."""
        vectors = check_vectors(vectors, what="item")
        num_items, dim = vectors.shape
        if kind != "scann_brute_force" and num_items < SMALLEST_TREE:
            logging.warning(
                "%s needs %d vectors; %d are searched by brute force.",
                kind,
                SMALLEST_TREE,
                num_items,
            )
            kind = "scann_brute_force"
        if kind == "scann_brute_force":
            return cls(
                build_searcher(vectors, num_leaves=0, reorder=0),
                Tuning(kind, num_items, dim, normalized),
            )
        tuning = Tuning(
            kind,
            num_items,
            dim,
            normalized,
            round(LEAVES_PER_ROOT * math.sqrt(num_items)),
            target_recall,
        )
        reorder = min(num_items, k * max(tuner.CANDIDATES)) if tuning.hashed else 0
        index = cls(build_searcher(vectors, num_leaves=tuning.num_leaves, reorder=reorder), tuning)
        queries = check_queries(queries, dim)
        queries = queries[
            queries.any(axis=1)
        ]  # one of length 0 has no best items that could be found
        if index._tune(vectors, queries if len(queries) else vectors, k, popularity):
            return index
        logging.warning(
            "%s does not reach recall %.4g at any effort; whole vectors are compared.",
            kind,
            target_recall,
        )
        return cls.build(
            vectors,
            kind=FALLBACK[kind],
            queries=queries,
            target_recall=target_recall,
            k=k,
            normalized=normalized,
            popularity=popularity,
        )

    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The (nearly) best items, best first.

        Args:
            queries: float [Q, D], finite.
            k: length of the lists.

        Returns:
            (scores float32 [Q, k], rows int32 [Q, k]); score -inf and row -1 where fewer than k
            were found.

        Raises:
            QueryError: as `ExactIndex.search`.
        """
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        check_k(k)
        effort = self._effort(k) if self.tuning.num_leaves else (0, 0)
        if not self.tuning.hashed or _least_square(queries) >= SHORT**2:
            return self.search_with(queries, k, *effort)
        lengths = np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
        lengths[lengths == 0.0] = 1.0
        scores, rows = self.search_with((queries / lengths).astype(np.float32), k, *effort)
        return (scores * lengths).astype(np.float32), rows

    def search_with(
        self, queries: np.ndarray, k: int, leaves: int, reorder: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` of checked queries with an effort of one's own."""
        if not len(queries) or not self.num_items:
            return _none_found(len(queries), k)
        options = {"final_num_neighbors": min(k, self.num_items)}
        if self.tuning.num_leaves:
            options["leaves_to_search"] = leaves
        if self.tuning.hashed:
            # Fewer candidates than the list is long would cut it short without a word.
            options["pre_reorder_num_neighbors"] = max(reorder, options["final_num_neighbors"])
        found, distances = self._ask(queries, options)
        # ScaNN fills short lists with row 0 at distance NaN, which makes the sum of squares NaN.
        if found.shape[1] == k and np.vdot(distances, distances) < np.inf:
            return distances, found.astype(np.int32)
        missing = np.isnan(distances)
        scores, rows = _none_found(len(queries), k)
        rows[:, : found.shape[1]] = np.where(missing, -1, found.astype(np.int32))
        scores[:, : found.shape[1]] = np.where(missing, -np.inf, distances)
        return scores, rows

    def _ask(self, queries: np.ndarray, options: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """(rows, scores) [Q, <= k] by the fastest of ScaNN's three ways."""
        if len(queries) == 1:
            rows, scores = self._searcher.search(queries[0], **options)
            return rows[None], scores[None]
        several = (
            len(queries) >= 256 and _cores() > 1
        )  # on one core its threads only stand in each other's way
        return (
            self._searcher.search_batched_parallel if several else self._searcher.search_batched
        )(queries, **options)

    def _searched_as(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self._effort = functools.lru_cache(maxsize=1_024)(
            tuning.effort
        )  # a tenth of the time of a single query

    def _tune(
        self, vectors: np.ndarray, queries: np.ndarray, k: int, popularity: np.ndarray | None
    ) -> bool:
        """Whether some effort reaches the target: the cheapest is then that of the index."""
        tuning = self.tuning
        problem = Problem(
            self.search_with, self.num_items, tuning.num_leaves, tuning.hashed, tuning.target_recall
        )
        efforts, tried, deciles = tuner.tune(problem, vectors, queries, k, popularity)
        self._searched_as(
            dataclasses.replace(tuning, efforts=efforts, tried=tried, recall_by_decile=deciles)
        )
        for effort in efforts:
            logging.info(
                "%s, lists of %d: %d of %d leaves, %d candidates, recall %.4f, target %.4f.",
                self.kind,
                effort.k,
                effort.leaves,
                tuning.num_leaves,
                effort.reorder,
                effort.recall,
                tuning.target_recall,
            )
        return bool(efforts)

    def save(self, folder: str | os.PathLike) -> None:
        save_searcher(self._searcher, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike, tuning: Tuning) -> ScannIndex:
        """The index that `save_index` wrote."""
        return cls(load_searcher(folder), tuning)


# What is built where a kind cannot reach the target. A tree that searches all its leaves is exact.
FALLBACK = {"scann_tree_ah": "scann_tree", "scann_tree": "scann_brute_force"}


def _kind(config: RetrievalConfig, num_items: int, dim: int, normalized: bool) -> str:
    if config.index == "scann_tree_ah" and not normalized:
        raise ConfigError(
            "config.retrieval.index='scann_tree_ah' loses recall on vectors that are not normalised (measured: 0.87). "
            "Use 'scann_tree', or model.normalize=True."
        )
    if config.index != "auto":
        return config.index
    if num_items < SMALLEST_TREE or not _has_scann():
        return "exact"
    if num_items * dim < BRUTE_FORCE_BELOW or num_items < SHARE_OF_CORPUS * config.k:
        return "scann_brute_force"
    return "scann_tree_ah" if num_items >= HASHING_FROM and normalized else "scann_tree"


def _least_square(queries: np.ndarray) -> float:
    """Of the lengths."""
    if len(queries) == 1:
        return float(np.vdot(queries, queries))
    return float(np.einsum("qd,qd->q", queries, queries).min(initial=np.inf))


def _none_found(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int32)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_scann() -> bool:
    try:
        import_scann()
    except ImportError as error:
        logging.info("Exact search: %s", error)
        return False
    return True
