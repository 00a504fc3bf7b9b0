"""Drift: the distance that vectors of the same users or items move from one model to the next.

Two trainings of one model may differ by a rotation, which changes no score. So one is rotated onto
the other before their cosines are taken (orthogonal Procrustes: Schönemann 1966); neighbourhoods
need no rotation.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.linalg
from jaxtyping import Float

from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import pc
from twotower.core.errors import HistoryError, extra
from twotower.core.files import atomic
from twotower.core.ragged import Ragged
from twotower.core.tables import format_table
from twotower.index.exact import top_k

NEIGHBOURS = 10
MAX_SAMPLE = 2_000  # entities whose neighbours are compared


@dataclasses.dataclass(frozen=True)
class Drift:
    """Movement between two versions of the vectors of one side.

    Attributes:
        ids: ids of the N entities of both versions.
        cosines: cosine of each entity's two vectors after alignment, float32 [N].
        sampled: rows of `ids` whose neighbours were compared, int [S], evenly spaced.
        overlaps: share of its nearest neighbours that each of these has kept, float32 [S].
        added: number of entities in the new version only.
        removed: number of entities in the old version only.
    """

    ids: pa.Array
    cosines: np.ndarray
    sampled: np.ndarray
    overlaps: np.ndarray
    added: int
    removed: int


def compare(
    old: tuple[pa.ChunkedArray, np.ndarray],
    new: tuple[pa.ChunkedArray, np.ndarray],
    *,
    k: int = NEIGHBOURS,
    sample: int = MAX_SAMPLE,
) -> Drift:
    """Measures the drift from one version to another.

    Args:
        old: entity ids and vectors, float [*, D].
        new: likewise; the two widths may differ.
        k: number of neighbours compared, among the entities of both.
        sample: number of entities at most whose neighbours are compared.

    Raises:
        HistoryError: an id stands twice, or fewer than two are in both.
    """
    for (ids, _), name in ((old, "old"), (new, "new")):
        if len(pc.unique(ids)) != len(ids):
            raise HistoryError(f"an id stands twice among the {len(ids)} of the {name} vectors.")
    row_in_new = pc.index_in(old[0], value_set=new[0].combine_chunks())
    both = pc.is_valid(row_in_new).to_numpy(zero_copy_only=False)
    if both.sum() < 2:
        raise HistoryError(
            f"{int(both.sum())} ids are in both versions; at least two are needed to compare them."
        )
    ids = old[0].combine_chunks().filter(pa.array(both))
    before = old[1][both]
    after = new[1][row_in_new.drop_null().to_numpy()]
    sampled = evenly_spaced(np.arange(len(ids)), sample)
    return Drift(
        ids=ids,
        cosines=aligned_cosines(before, after),
        sampled=sampled,
        overlaps=neighbour_overlap(before, after, sampled, k=k),
        added=len(new[0]) - len(ids),
        removed=len(old[0]) - len(ids),
    )


def rotation(
    old: Float[np.ndarray, "N D"], new: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, "D D"]:
    """Returns the orthogonal R that makes the sum of squares of `old @ R - new` least.

    >>> turned = np.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> rotation(np.eye(2), turned).round(6).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    # In float64: of float32 vectors the result would be orthogonal to seven digits alone.
    return scipy.linalg.orthogonal_procrustes(old.astype(np.float64), new.astype(np.float64))[0]


def aligned_cosines(
    old: Float[np.ndarray, "N C"], new: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, " N"]:
    """Returns the cosine of each row of `old` with the same of `new` after rotation.

    The rotation is the one that makes the mean cosine greatest. A narrower side gets further
    coordinates of 0. A vector of length 0 has cosine 0.
    """
    width = max(old.shape[1], new.shape[1])
    old, new = (np.pad(_normalize(x), ((0, 0), (0, width - x.shape[1]))) for x in (old, new))
    rotated = old @ rotation(old, new).astype(np.float32)
    return np.einsum("nd,nd->n", rotated, new).clip(-1.0, 1.0)


def neighbour_overlap(
    old: Float[np.ndarray, "N C"],
    new: Float[np.ndarray, "N D"],
    rows: np.ndarray,
    *,
    k: int = NEIGHBOURS,
) -> Float[np.ndarray, " S"]:
    """Returns the share of nearest neighbours that entities have kept.

    Args:
        old: vectors of the old version.
        new: vectors of the new version.
        rows: the S entities, rows of both.
        k: number of neighbours of greatest cosine.
    """
    k = min(k, len(old) - 1)
    itself = Ragged.from_pairs(np.arange(len(rows)), rows, num_rows=len(rows))

    def neighbours(vectors: np.ndarray) -> np.ndarray:
        unit = _normalize(vectors)
        return top_k(unit[rows], unit, k, exclude=itself)[1]

    before, after = neighbours(old), neighbours(new)
    kept = (before[:, :, None] == after[:, None, :]).any(2)
    return kept.mean(1).astype(np.float32)


def format_drift(drift: Drift, *, most: int = 10) -> str:
    """Returns counts, a table of quantiles, and the `most` entities that have moved furthest."""
    counts = [
        f"{len(drift.ids):,} in both",
        f"{drift.added:,} only in the new",
        f"{drift.removed:,} only in the old.",
    ]
    shares = (0.01, 0.1, 0.5, 0.9, 0.99)
    rows = []
    for name, values in (("cosine, aligned", drift.cosines), ("neighbours kept", drift.overlaps)):
        figures = [values.mean(), *np.quantile(values, shares)]
        rows.append([name, *(f"{figure:.3f}" for figure in figures)])
    header = ["", "mean", *(f"{share:.0%}" for share in shares)]
    moved = np.argsort(drift.cosines, kind="stable")[:most]
    names = [f"{drift.ids[int(row)].as_py()} ({drift.cosines[row]:.3f})" for row in moved]
    return "\n".join(
        [
            ", ".join(counts),
            format_table(rows, header, align="lr"),
            f"Moved most: {', '.join(names)}.",
        ]
    )


def plot(drift: Drift, path: str | os.PathLike, *, title: str) -> None:
    """Draws histograms of cosines and of neighbours kept.

    Args:
        drift: what `compare` measured.
        path: image to write, whole or not at all; its suffix names the format.
        title: title of the image.
    """
    with extra("plots", "a plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _histogram(
        left,
        drift.cosines,
        np.linspace(min(0.0, float(drift.cosines.min())), 1.0, 51),
        "cosine after alignment",
    )
    _histogram(
        right, drift.overlaps, np.linspace(-0.05, 1.05, 12), "share of nearest neighbours kept"
    )
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix.removeprefix(".") or "png")


def _histogram(axes: Any, values: np.ndarray, bins: np.ndarray, label: str) -> None:
    axes.hist(values, bins=bins)
    axes.axvline(
        float(np.median(values)),
        color="black",
        linewidth=1,
        label=f"median {np.median(values):.3f}",
    )
    axes.set_xlabel(label)
    axes.set_ylabel("entities")
    axes.legend()


def _normalize(vectors: np.ndarray) -> np.ndarray:
    """Returns the rows at length 1; one of length 0 stays."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
