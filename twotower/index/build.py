"""Indexes built, saved and loaded by kind: exact, ScaNN tuned to a recall target, or a graph.

ScaNN has no wheel for every platform; where it cannot be imported, "auto" means exact search.
hnswlib and FAISS are used where the configuration names them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from twotower.config import Config, RetrievalConfig
from twotower.core.arrays import evenly_spaced
from twotower.core.errors import BadIndexError, ConfigError, choose
from twotower.core.kinds import Kinds
from twotower.index.base import TUNING_QUERIES, Index, LibraryIndex, check_vectors
from twotower.index.exact import ExactIndex
from twotower.index.vectors import Vectors, append_coordinate, popularity_coordinate

# Vectors below which exact search is quick enough, and ScaNN need not be imported.
MIN_SCANN_VECTORS = 1_000
# Numbers in all vectors below which ScaNN compares them all: exact, and within a fraction of a
# millisecond.
MIN_TREE_NUMBERS = 50_000 * 64
# Vectors from which asymmetric hashing beats comparing whole vectors in the leaves.
MIN_HASHED_VECTORS = 200_000
# A list of more than one in so many items is found by looking at all of them.
MIN_ITEMS_PER_ENTRY = 20

# Kinds of `config.retrieval.index`, and what each is.
KINDS = {
    "auto": (
        "what suits the number, width and length of vectors, the lists asked for, and the platform"
    ),
    "exact": "exhaustive search by JAX",
    "scann_brute_force": "exhaustive search by ScaNN",
    "scann_tree": (
        "ScaNN: a tree, whole vectors compared in the leaves; the fastest where queries come in "
        "hundreds"
    ),
    "scann_tree_ah": (
        "ScaNN: a tree, 4-bit codes compared in the leaves, the best scored anew; the fastest for "
        "single queries of large catalogues; normalised vectors only"
    ),
    "hnswlib": "a graph, by hnswlib",
    "faiss": "a graph, by FAISS",
}
# Those that a library builds and searches, each loaded where a bundle has it or one is to be built.
LIBRARIES: Kinds[type[LibraryIndex]] = Kinds(
    "index",
    {
        "scann_brute_force": "twotower.index.scann:ScannIndex",
        "scann_tree": "twotower.index.scann:ScannIndex",
        "scann_tree_ah": "twotower.index.scann:ScannIndex",
        "hnswlib": "twotower.index.graphs:GraphIndex",
        "faiss": "twotower.index.graphs:GraphIndex",
    },
)


def build_index(
    vectors: ArrayLike,
    config: RetrievalConfig,
    *,
    normalized: bool,
    queries: np.ndarray | None = None,
    popularity: np.ndarray | None = None,
) -> Index:
    """Builds the index of kind `config.index` over `vectors`.

    Args:
        vectors: float [N, D], finite.
        config: Kind of the index, and the recall that it must reach.
        normalized: Whether the vectors have length 1.
        queries: float [Q, D] user vectors to tune on; at most 2,000 are used. Without any, items
            are.
        popularity: Popularity of each item, [N], for the recall of each decile of popularity.

    Raises:
        ConfigError: The kind is unknown, or unfit for vectors that are not normalised.
        ImportError: A library was asked for by name and cannot be imported.
    """
    choose(KINDS, config.index, "config.retrieval.index")
    # Before the kind is resolved: ScaNN ends the process on vectors that are not finite.
    vectors = check_vectors(vectors, what="item")
    num_items, dim = vectors.shape
    kind = resolve_kind(config, num_items, dim, normalized=normalized)
    if kind == "exact":
        return ExactIndex(vectors, normalized=normalized)
    # Items are worse to tune on than users, but a run may have none of these.
    if queries is None or not len(queries):
        queries = vectors
    return LIBRARIES[kind].build(
        vectors,
        config,
        kind=kind,
        queries=queries,
        normalized=normalized,
        popularity=popularity,
    )


def index_items(config: Config, vectors: Vectors, counts: np.ndarray, users: np.ndarray) -> Index:
    """Builds the index of a bundle.

    Args:
        config: Configuration of the run.
        vectors: float [N, D], item vectors.
        counts: int [N], training rows of each item.
        users: float [U, D], user vectors to tune on; without any, items are taken.
    """
    if not len(users):
        # Of a bundle without users: items are vectors of the same space.
        users = np.asarray(vectors[evenly_spaced(np.arange(len(vectors)), TUNING_QUERIES)])
    queries = evenly_spaced(users, TUNING_QUERIES)
    if config.retrieval.popularity:
        coordinate, _ = popularity_coordinate(counts, vectors.shape[1])
        vectors = append_coordinate(vectors, coordinate)
        # Tuned for weight 0, the plain dot product.
        queries = append_coordinate(queries, 0.0)
    return build_index(
        vectors,
        config.retrieval,
        normalized=config.model.normalize,
        queries=queries,
        popularity=counts,
    )


def resolve_kind(config: RetrievalConfig, num_items: int, dim: int, *, normalized: bool) -> str:
    """Returns the kind of index to build; "auto" becomes the kind that suits the vectors.

    Raises:
        ConfigError: The kind is unfit for vectors that are not normalised.
    """
    if config.index == "scann_tree_ah" and not normalized:
        raise ConfigError(
            "config.retrieval.index='scann_tree_ah' loses recall on vectors that are not "
            "normalised (measured: 0.87). Use 'scann_tree', or model.normalize=True."
        )
    if config.index != "auto":
        return config.index
    # In this order: ScaNN is imported, which takes a while, only where it is of use.
    if num_items < MIN_SCANN_VECTORS or not has_library("scann_tree"):
        return "exact"
    if num_items * dim < MIN_TREE_NUMBERS or num_items < MIN_ITEMS_PER_ENTRY * config.k:
        return "scann_brute_force"
    # Single queries, as a server gets them, decide: in batches at a recall of .99 "scann_tree" is
    # 1.7 times as fast.
    if num_items >= MIN_HASHED_VECTORS and normalized:
        return "scann_tree_ah"
    return "scann_tree"


def has_library(kind: str) -> bool:
    """Whether the library of a kind can be imported; where not, the log says why."""
    try:
        LIBRARIES[kind].import_library(kind)
    except ImportError as error:
        logging.info("Exact search: %s", error)
        return False
    return True


def save_index(index: Index, folder: str | os.PathLike, **more: Any) -> dict[str, Any]:
    """Writes `index`, and index.json with its settings and the trials of its tuning.

    Args:
        index: Index to write.
        folder: Folder to write into; made where there is none.
        more: Further entries of index.json.

    Returns:
        The content of index.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    info = index.save(folder) | more
    (folder / "index.json").write_text(json.dumps(info, indent=2, sort_keys=True) + "\n")
    return info


def load_index(folder: str | os.PathLike, vectors: Vectors) -> Index:
    """Loads the index that `save_index` wrote; exact search where its library is missing.

    Args:
        folder: Folder of the index.
        vectors: float [N, D], the vectors that it was built over.

    Raises:
        BadIndexError: The index is of other vectors, or cannot be read.
    """
    info = json.loads((Path(folder) / "index.json").read_text())
    # Rows of another corpus would be answered as if they were these.
    if (info["num_items"], info["dim"]) != vectors.shape:
        raise BadIndexError(
            f"{folder} indexes {info['num_items']} vectors {info['dim']} wide, "
            f"not {list(vectors.shape)}."
        )
    kind = info["kind"]
    # An exact index is no more than the vectors, so it is built anew.
    if kind == "exact":
        return ExactIndex(vectors, normalized=info["normalized"])
    try:
        return LIBRARIES[kind].load(folder, info)
    # A bundle that was made where ScaNN runs is served elsewhere too, only slower.
    except ImportError as error:
        logging.warning("The search is exact, and slower, in place of %s: %s", kind, error)
        return ExactIndex(vectors, normalized=info["normalized"])
