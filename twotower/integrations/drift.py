"""How far the vectors of the same users or items have moved from one model to the next.

Two trainings of one model may differ by a rotation, which changes no score. So one is turned onto
the other before their cosines are taken (orthogonal Procrustes: Schönemann 1966); neighbourhoods
need no turning.
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
SAMPLE = 2_000  # entities whose neighbours are compared


@dataclasses.dataclass(frozen=True)
class Drift:
    """What has moved between two versions of the vectors of one side.

    Attributes:
        ids: of the N entities of both.
        cosines: float32 [N], of each entity's two vectors after alignment.
        sampled: int [S], the rows of `ids` that `overlaps` is about, evenly spaced.
        overlaps: float32 [S], the share of its nearest neighbours that an entity has kept.
        added, removed: how many entities are only in the new, only in the old version.
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
    sample: int = SAMPLE,
) -> Drift:
    """The drift from `old` to `new`, each entity ids and float [*, D]; the two widths may differ.

    Args:
        k: neighbours compared, among the entities of both.
        sample: entities whose neighbours are compared at most.

    Raises:
        HistoryError: an id stands twice, or fewer than two are in both.
    """
    for (ids, _), name in ((old, "old"), (new, "new")):
        if len(pc.unique(ids)) != len(ids):
            raise HistoryError(f"an id stands twice among the {len(ids)} of the {name} vectors.")
    at = pc.index_in(old[0], value_set=new[0].combine_chunks())
    both = pc.is_valid(at).to_numpy(zero_copy_only=False)
    if both.sum() < 2:
        raise HistoryError(
            f"{int(both.sum())} ids are in both versions; at least two are needed to compare them."
        )
    ids = old[0].combine_chunks().filter(pa.array(both))
    before, after = old[1][both], new[1][at.drop_null().to_numpy()]
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
    """The orthogonal R that makes the sum of squares of `old @ R - new` least.

    >>> turned = np.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> rotation(np.eye(2), turned).round(6).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    # In float64: of float32 vectors the result would be orthogonal to seven digits alone.
    return scipy.linalg.orthogonal_procrustes(old.astype(np.float64), new.astype(np.float64))[0]


def aligned_cosines(
    old: Float[np.ndarray, "N C"], new: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, " N"]:
    """The cosine of each row of `old` with the same of `new`, after the rotation that makes their
    mean greatest.

    A narrower side gets further coordinates of 0. A vector of length 0 has cosine 0.
    """
    width = max(old.shape[1], new.shape[1])
    old, new = (np.pad(_units(x), ((0, 0), (0, width - x.shape[1]))) for x in (old, new))
    turned = old @ rotation(old, new).astype(np.float32)
    return np.einsum("nd,nd->n", turned, new).clip(-1.0, 1.0)


def neighbour_overlap(
    old: Float[np.ndarray, "N C"],
    new: Float[np.ndarray, "N D"],
    rows: np.ndarray,
    *,
    k: int = NEIGHBOURS,
) -> Float[np.ndarray, " S"]:
    """Of each of `rows` the share of its k neighbours of greatest cosine in `old` that are among
    those in `new`."""
    k = min(k, len(old) - 1)
    itself = Ragged.from_pairs(np.arange(len(rows)), rows, num_rows=len(rows))
    before, after = (top_k(_units(x)[rows], _units(x), k, exclude=itself)[1] for x in (old, new))
    return (before[:, :, None] == after[:, None, :]).any(2).mean(1).astype(np.float32)


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
    """Writes histograms of cosines and of neighbours kept as a PNG (or what the suffix says), whole
    or not at all."""
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


def _units(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; one of length 0 stays."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
