"""Indexes built, saved and loaded by kind: exact, ScaNN tuned to a recall target, or a graph.

ScaNN has no wheel for every platform; where it cannot be imported, "auto" means exact search.
hnswlib and FAISS are used where the configuration names them, FAISS's inverted files also where it
says "fastest".
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from twotower.config import Config, RetrievalConfig
from twotower.core.arrays import evenly_spaced
from twotower.core.errors import BadIndexError, ConfigError, choose
from twotower.core.kinds import Kinds
from twotower.index.base import (
    TUNING_QUERIES,
    Build,
    Index,
    LibraryIndex,
    ShardedIndex,
    check_vectors,
)
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
# ScaNN's builds that are compared where trees pay: with codes, with whole vectors, and with whole
# vectors in many short lists. Others were measured and lost; see experiments/benchmarks/RESULTS.md.
SCANN_BUILDS = (
    Build("scann_tree_ah", 3),
    Build("scann_tree", 3),
    Build("scann_tree", 8),
)
# FAISS's beside them: the numbers of lists that win at high and at low recalls.
FAISS_BUILDS = (Build("faiss_ivf", 4), Build("faiss_ivf", 8))
# Times as fast as the best build so far that another must be. Of "auto" more than a busy machine
# feigns, so that the choice of the rule stays where nothing speaks against it.
MIN_GAINS = {"auto": 1.1, "fastest": 1.02}

# Kinds of `config.retrieval.index`, and what each is.
KINDS = {
    "auto": (
        "what suits the number, width and length of vectors, the lists asked for, and the "
        "platform; of ScaNN's trees the one that is fastest on the vectors"
    ),
    "fastest": "as auto, and FAISS's inverted files are compared with ScaNN's trees",
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
    "faiss_ivf": "inverted files over whole vectors, by FAISS",
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
        "faiss_ivf": "twotower.index.inverted:InvertedIndex",
    },
)


def build_index(
    vectors: ArrayLike,
    config: RetrievalConfig,
    *,
    normalized: bool,
    queries: np.ndarray | None = None,
    popularity: np.ndarray | None = None,
    like: Index | None = None,
) -> Index:
    """Builds the index of kind `config.index` over `vectors`.

    Args:
        vectors: float [N, D], finite.
        config: Kind of the index, and the recall that it must reach.
        normalized: Whether the vectors have length 1.
        queries: float [Q, D] user vectors to tune on; at most 2,000 are used. Without any, items
            are.
        popularity: Popularity of each item, [N], for the recall of each decile of popularity.
        like: Index over earlier vectors of the same model, whose build is taken without comparing
            others again.

    Raises:
        ConfigError: The kind is unknown, or unfit for vectors that are not normalised.
        ImportError: A library was asked for by name and cannot be imported.
    """
    choose(KINDS, config.index, "config.retrieval.index")
    # Before the kind is resolved: ScaNN ends the process on vectors that are not finite.
    vectors = check_vectors(vectors, what="item")
    num_items, dim = vectors.shape
    builds = builds_to_compare(config, num_items, dim, normalized=normalized)
    if builds[0].kind == "exact":
        return ExactIndex(vectors, normalized=normalized)
    # Items are worse to tune on than users, but a run may have none of these.
    if queries is None or not len(queries):
        queries = vectors

    def make(build: Build, vectors: np.ndarray) -> Index:
        # Of a sample the deciles of popularity would be others.
        is_sample = len(vectors) < num_items
        return LIBRARIES[build.kind].build(
            vectors,
            config,
            kind=build.kind,
            queries=queries,
            normalized=normalized,
            popularity=None if is_sample else popularity,
            leaves_per_root=build.leaves_per_root,
        )

    if len(builds) == 1:
        return make(builds[0], vectors)
    # Loaded where there is a choice: what answers requests needs nothing of it.
    from twotower.index.comparison import build_of, fastest_index

    if like is not None:
        return make(build_of(like) or builds[0], vectors)
    return fastest_index(
        builds,
        make,
        vectors,
        queries,
        config.k,
        optimize_for=config.optimize_for,
        min_gain=MIN_GAINS[config.index],
    )


def index_items(
    config: Config,
    vectors: Vectors,
    counts: np.ndarray,
    users: np.ndarray,
    like: Index | None = None,
    shards: Sequence[np.ndarray] = (),
) -> Index:
    """Builds the index of a bundle.

    Args:
        config: Configuration of the run.
        vectors: float [N, D], item vectors.
        counts: int [N], training rows of each item.
        users: float [U, D], user vectors to tune on; without any, items are taken.
        like: Index over earlier vectors; see `build_index`.
        shards: Rows of the items of each shard, rising; one index is built of each, tuned on its
            own vectors. None by default: a single index of all items.
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

    def build(vectors: Vectors, counts: np.ndarray, like: Index | None) -> Index:
        # Nothing can be learned of no vectors.
        if not len(vectors):
            return ExactIndex(np.asarray(vectors), normalized=config.model.normalize)
        return build_index(
            vectors,
            config.retrieval,
            normalized=config.model.normalize,
            queries=queries,
            popularity=counts,
            like=like,
        )

    if not shards:
        return build(vectors, counts, like)
    from twotower.index.shards.divided import DividedIndex

    before = like.parts if isinstance(like, ShardedIndex) else ()
    parts = []
    for number, rows in enumerate(shards):
        part_before = before[number] if number < len(before) else None
        # The coordinate of popularity is that of the whole: one query asks all shards.
        parts.append(build(vectors[rows], counts[rows], part_before))
    return DividedIndex(parts, shards)


def builds_to_compare(
    config: RetrievalConfig, num_items: int, dim: int, *, normalized: bool
) -> list[Build]:
    """Returns the builds of which the fastest is to be taken, that of the rule first.

    It is one where the configuration names it, and where comparing all items is quick enough.

    Raises:
        ConfigError: The kind is unfit for vectors that are not normalised.
    """
    kind = resolve_kind(config, num_items, dim, normalized=normalized)
    if config.index not in MIN_GAINS or _is_small(config, num_items, dim):
        return [Build(kind)]
    builds: list[Build] = []
    # Where ScaNN is missing the rule is exact search, which is not compared with trees.
    if kind != "exact":
        builds = [build for build in SCANN_BUILDS if normalized or build.kind != "scann_tree_ah"]
        # A stable sort: the first of the rule's kind comes first, the others stay in their order.
        builds.sort(key=lambda build: build.kind != kind)
    if config.index == "fastest":
        builds += _faiss_builds()
    return builds or [Build(kind)]


def _faiss_builds() -> Sequence[Build]:
    """Returns FAISS's builds, or none where it cannot be imported, which is said."""
    try:
        LIBRARIES["faiss_ivf"].import_library("faiss_ivf")
    except ImportError as error:
        logging.warning("config.retrieval.index='fastest' compares ScaNN's builds alone: %s", error)
        return ()
    return FAISS_BUILDS


def _is_small(config: RetrievalConfig, num_items: int, dim: int) -> bool:
    """Whether all items are compared as quickly as an index would be searched."""
    if num_items < MIN_SCANN_VECTORS or num_items * dim < MIN_TREE_NUMBERS:
        return True
    return num_items < MIN_ITEMS_PER_ENTRY * config.k


def resolve_kind(config: RetrievalConfig, num_items: int, dim: int, *, normalized: bool) -> str:
    """Returns the kind of index to build; "auto" and "fastest" become the kind that mostly suits.

    Raises:
        ConfigError: The kind is unfit for vectors that are not normalised.
    """
    if config.index == "scann_tree_ah" and not normalized:
        raise ConfigError(
            "config.retrieval.index='scann_tree_ah' loses recall on vectors that are not "
            "normalised (measured: 0.87). Use 'scann_tree', or model.normalize=True."
        )
    if config.index not in MIN_GAINS:
        return config.index
    # In this order: ScaNN is imported, which takes a while, only where it is of use.
    if num_items < MIN_SCANN_VECTORS or not has_library("scann_tree"):
        return "exact"
    if _is_small(config, num_items, dim):
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
