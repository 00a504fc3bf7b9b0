"""ScaNN with the contract of `Index.search`: trees tuned to a recall target, and brute force.

ScaNN ends the process on vectors that are not finite, answers queries of small length at random
where it compares codes, and pads its answers with row 0: everything that goes in and comes out is
checked here. It has no wheel for every platform; `import_scann` says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from twotower.config import RetrievalConfig
from twotower.core.errors import BadIndexError
from twotower.index import tuning as tuner
from twotower.index.base import check_queries, check_vectors, empty_lists, list_length
from twotower.index.tuned import TunedIndex
from twotower.index.tuning import Tuning

# Below so many vectors ScaNN cannot always train a tree, and has nothing to gain.
MIN_TREE_VECTORS = 1_000
MAX_TRAINING_VECTORS = 250_000  # vectors that the leaves of a tree are learned from
# Leaves in multiples of the square root of the number of items. Measured at 200,000 learned
# vectors: 1 and 2 look at 1.5 to 3 times the items for one recall, and 8 spend more time on
# choosing leaves than codes save within them.
LEAVES_PER_ROOT = 3
# Length of a query below which it is lengthened where codes are compared: ScaNN rounds what a code
# adds to a score to a step that does not shrink with the query. Measured: right at 1e-3, arbitrary
# items without a word from 1e-4 down.
MIN_QUERY_LENGTH = 0.1
MIN_PARALLEL_QUERIES = 256  # queries in a batch from which ScaNN's threads gain anything
# Kind that is built where another cannot reach its target. A tree that searches all its leaves is
# exact.
FALLBACK = {
    "scann_tree_ah": "scann_tree",
    "scann_tree": "scann_brute_force",
}


class ScannIndex(TunedIndex):
    """A ScaNN searcher with the contract of `ExactIndex.search`.

    Rows of -1 and scores of -inf pad short lists.
    """

    def __init__(self, searcher: Any, tuning: Tuning):
        """Wraps a searcher.

        Args:
            searcher: ScaNN's searcher over the vectors.
            tuning: Settings of its searches.
        """
        super().__init__(tuning)
        self._searcher = searcher
        self._is_parallel = True

    @classmethod
    def build(
        cls,
        vectors: ArrayLike,
        config: RetrievalConfig,
        *,
        kind: str,
        queries: ArrayLike,
        normalized: bool = False,
        popularity: np.ndarray | None = None,
        leaves_per_root: int | None = None,
    ) -> ScannIndex:
        """Builds a searcher; see `LibraryIndex`.

        Few vectors get brute force, and a tree that does not reach the target gives way to the next
        kind of `FALLBACK`.
        """
        target_recall = config.target_recall
        vectors = check_vectors(vectors, what="item")
        num_items, dim = vectors.shape
        if kind != "scann_brute_force" and num_items < MIN_TREE_VECTORS:
            logging.warning(
                "%s needs %d vectors; %d are searched by brute force.",
                kind,
                MIN_TREE_VECTORS,
                num_items,
            )
            kind = "scann_brute_force"
        if kind == "scann_brute_force":
            searcher = build_searcher(vectors, num_leaves=0, reorder=0)
            return cls(searcher, Tuning(kind, num_items, dim, normalized))
        num_leaves = round((leaves_per_root or LEAVES_PER_ROOT) * math.sqrt(num_items))
        tuning = Tuning(kind, num_items, dim, normalized, num_leaves, target_recall)
        # The searcher holds the most candidates that tuning tries; a search may then take fewer.
        max_reorder = 0
        if tuning.hashed:
            max_reorder = min(num_items, config.k * max(tuner.REORDER_FACTORS))
        searcher = build_searcher(vectors, num_leaves=num_leaves, reorder=max_reorder)
        index = cls(searcher, tuning)
        if index.find_efforts(vectors, queries, config.k, popularity):
            return index
        logging.warning(
            "%s does not reach recall %.4g at any effort; whole vectors are compared.",
            kind,
            target_recall,
        )
        return cls.build(
            vectors,
            config,
            kind=FALLBACK[kind],
            queries=queries,
            normalized=normalized,
            popularity=popularity,
        )

    def search(self, queries: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the nearly best items of each query, best first; see `Index.search`."""
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        k = list_length(k, self.num_items)
        leaves = 0
        reorder = 0
        if self.tuning.num_leaves:
            leaves, reorder = self._effort(k)
        # Whole vectors score queries of any length right.
        if not self.tuning.hashed or _least_square(queries) >= MIN_QUERY_LENGTH**2:
            return self.search_with(queries, k, leaves, reorder)
        # Searched at length 1, and the scores scaled back: the ranking is that of the direction.
        lengths = np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
        lengths[lengths == 0.0] = 1.0
        units = (queries / lengths).astype(np.float32)
        scores, rows = self.search_with(units, k, leaves, reorder)
        return (scores * lengths).astype(np.float32), rows

    def search_with(
        self, queries: np.ndarray, k: int, leaves: int, reorder: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Searches with given settings.

        Args:
            queries: float32 [Q, D], checked.
            k: Length of the lists.
            leaves: Leaves searched for each query.
            reorder: Candidates scored anew with whole vectors.
        """
        k = min(k, self.num_items)
        if not len(queries) or not k:
            return empty_lists(len(queries), k)
        # -1 is ScaNN's own choice. Fewer candidates than the list is long would cut it short
        # without a word.
        leaves = leaves if self.tuning.num_leaves else -1
        reorder = max(reorder, k) if self.tuning.hashed else -1
        # ScaNN's rows are unsigned; those of every index are int32, so that -1 can stand for none.
        neighbors, products = self._call_searcher(queries, k, leaves, reorder)
        # ScaNN fills short lists with row 0 at score NaN, which makes the sum of squares NaN.
        # That is one pass, and no array, for nearly all answers.
        if neighbors.shape[1] == k and np.vdot(products, products) < np.inf:
            return products, neighbors.astype(np.int32)
        missing = np.isnan(products)
        scores, rows = empty_lists(len(queries), k)
        rows[:, : neighbors.shape[1]] = np.where(missing, -1, neighbors.astype(np.int32))
        scores[:, : neighbors.shape[1]] = np.where(missing, -np.inf, products)
        return scores, rows

    @contextlib.contextmanager
    def one_thread(self) -> Iterator[None]:
        """Keeps batches from ScaNN's threads."""
        self._is_parallel = False
        try:
            yield
        finally:
            self._is_parallel = True

    def save(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes the searcher; see `Index.save`."""
        save_searcher(self._searcher, folder)
        return dataclasses.asdict(self.tuning) | {"scann_version": scann_version()}

    @classmethod
    def load(cls, folder: str | os.PathLike, info: dict[str, Any]) -> ScannIndex:
        """Returns the index that `save` wrote; see `LibraryIndex`."""
        return cls(load_searcher(folder), Tuning.from_dict(info))

    @staticmethod
    def import_library(kind: str) -> Any:
        """Returns ScaNN's searcher module; see `LibraryIndex`."""
        return import_scann()

    def _call_searcher(
        self, queries: np.ndarray, k: int, leaves: int, reorder: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (rows, scores) [Q, <= k] by the fastest of ScaNN's three calls."""
        if len(queries) == 1:
            # As its method of Python does, which takes a microsecond of the thirty.
            rows, scores = self._searcher.searcher.search(queries[0], k, reorder, leaves)
            return rows[None], scores[None]
        options = {
            "final_num_neighbors": k,
            "pre_reorder_num_neighbors": reorder,
            "leaves_to_search": leaves,
        }
        # On one core its threads only stand in each other's way.
        is_large = len(queries) >= MIN_PARALLEL_QUERIES
        if is_large and self._is_parallel and _num_cores() > 1:
            return self._searcher.search_batched_parallel(queries, **options)
        return self._searcher.search_batched(queries, **options)


def import_scann() -> Any:
    """Returns ScaNN's searcher module.

    ScaNN loads a TensorFlow operation where TensorFlow is installed, and fails with every
    TensorFlow that it was not built with. The operation is not needed here, so TensorFlow is hidden
    while ScaNN is imported.

    Raises:
        ImportError: ScaNN is missing; the message names what to do.
    """
    # Typed anew: None in the place of a module is allowed, but not by the type of `sys.modules`.
    modules: dict[str, Any] = sys.modules
    loaded = modules.get("tensorflow")
    modules["tensorflow"] = None  # in the place of a module, it makes the import fail
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise ImportError(
            f"ScaNN cannot be imported ({error}). Install scann (Linux), or use index=exact."
        ) from error
    finally:
        modules.pop("tensorflow")
        if loaded is not None:
            modules["tensorflow"] = loaded
    return scann_ops_pybind


def scann_version() -> str:
    """Returns the version of the installed library."""
    return metadata.version("scann")


def build_searcher(vectors: np.ndarray, *, num_leaves: int, reorder: int) -> Any:
    """Builds a ScaNN searcher of greatest dot products.

    Args:
        vectors: float32 [N, D], finite.
        num_leaves: Leaves of the tree; 0 builds none.
        reorder: Largest number of candidates scored anew; 0 compares whole vectors from the start,
            without hashing.

    Raises:
        BadIndexError: ScaNN refuses the vectors.
    """
    # 10 is ScaNN's default length of lists; every search names its own.
    builder = import_scann().builder(vectors, 10, "dot_product")
    if num_leaves:
        # random_init=False: k-means++ gives the same tree each time, the default is seeded by the
        # clock.
        builder = builder.tree(
            num_leaves=num_leaves,
            num_leaves_to_search=num_leaves,
            training_sample_size=min(len(vectors), MAX_TRAINING_VECTORS),
            min_partition_size=1,
            random_init=False,
        )
    if reorder:
        # Two dimensions to a code of 4 bits. Measured at 200,000 x 64: with four a query takes a
        # fifth longer, and a recall of .99 is not reached.
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
        builder = builder.reorder(reorder)
    else:
        builder = builder.score_brute_force()
    try:
        with capture_stderr():
            return builder.build()
    except (RuntimeError, ValueError) as error:
        raise BadIndexError(
            f"ScaNN cannot index vectors of shape {list(vectors.shape)}: {error}"
        ) from error


def save_searcher(searcher: Any, folder: str | os.PathLike) -> None:
    """Writes a searcher into `folder`."""
    # Relative: absolute paths would break when the folder moves.
    with capture_stderr():
        searcher.serialize(str(folder), relative_path=True)


def load_searcher(folder: str | os.PathLike) -> Any:
    """Returns the searcher that `save_searcher` wrote.

    Raises:
        BadIndexError: The folder holds none that can be read, or a pickle beside it.
    """
    if (Path(folder) / "scann_docids.pkl").exists():
        raise BadIndexError(
            f"{folder}/scann_docids.pkl is a pickle, which is never written here and not read."
        )
    library = import_scann()
    try:
        with capture_stderr():
            return library.load_searcher(str(folder))
    except (RuntimeError, ValueError) as error:
        raise BadIndexError(f"{folder} holds no ScaNN index that can be read: {error}") from error


@contextlib.contextmanager
def capture_stderr() -> Iterator[None]:
    """Sends ScaNN's own log lines, which no setting silences, to the debug log."""
    sys.stderr.flush()
    # At the level of file descriptors: the lines are written by C++, past sys.stderr.
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            captured.seek(0)
            logging.debug("ScaNN: %s", captured.read().decode(errors="replace"))


def _least_square(queries: np.ndarray) -> float:
    """Returns the square of the length of the shortest query; infinite without queries."""
    if len(queries) == 1:
        return float(np.vdot(queries, queries))
    squares = np.einsum("qd,qd->q", queries, queries)
    return float(squares.min(initial=np.inf))


def _num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
