"""Drift: the distance that vectors of the same users or items move from one model to the next.

Two trainings of one model may differ by a rotation, which changes no score. So one is rotated onto
the other before their cosines are taken (orthogonal Procrustes: Schönemann 1966); neighbourhoods
need no rotation.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import scipy.linalg
from jaxtyping import Float

from twotower.core.arrays import Ragged, evenly_spaced
from twotower.core.arrow import pc
from twotower.core.errors import HistoryError
from twotower.core.files import atomic
from twotower.core.install import extra
from twotower.core.tables import format_table
from twotower.index.exact import top_k

if TYPE_CHECKING:  # an extra, which is not always installed
    from matplotlib.axes import Axes

NEIGHBOURS = 10
# Entities whose neighbours are compared: each is searched for among all, which is the longest part.
MAX_SAMPLE = 2_000


@dataclasses.dataclass(frozen=True)
class Drift:
    """Movement between two versions of the vectors of one side.

    Attributes:
        ids: Ids of the N entities of both versions.
        cosines: Cosine of each entity's two vectors after alignment, float32 [N].
        sample: Rows of `ids` whose neighbours were compared, int [S], evenly spaced.
        overlaps: Share of its nearest neighbours that each of these has kept, float32 [S].
        added: Number of entities in the new version only.
        removed: Number of entities in the old version only.
    """

    ids: pa.Array
    cosines: np.ndarray
    sample: np.ndarray
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
        old: Entity ids and vectors, float [*, D].
        new: Likewise; the two widths may differ.
        k: Number of neighbours compared, among the entities of both.
        sample: Greatest number of entities whose neighbours are compared.

    Raises:
        HistoryError: An id stands twice, or fewer than two are in both.
    """
    old_ids, old_vectors = old
    new_ids, new_vectors = new
    for ids, name in ((old_ids, "old"), (new_ids, "new")):
        # Rows of both could not be matched by id.
        if len(pc.unique(ids)) != len(ids):
            raise HistoryError(f"an id stands twice among the {len(ids)} of the {name} vectors.")
    row_in_new = pc.index_in(old_ids, value_set=new_ids.combine_chunks())
    in_both = pc.is_valid(row_in_new).to_numpy(zero_copy_only=False)
    # One entity can always be rotated onto itself, and has no neighbour.
    if in_both.sum() < 2:
        raise HistoryError(
            f"{int(in_both.sum())} ids are in both versions; "
            "at least two are needed to compare them."
        )
    # Both in the order of the old version.
    common_ids = old_ids.combine_chunks().filter(pa.array(in_both))
    before = old_vectors[in_both]
    after = new_vectors[row_in_new.drop_null().to_numpy()]
    sample_rows = evenly_spaced(np.arange(len(common_ids)), sample)
    return Drift(
        ids=common_ids,
        cosines=aligned_cosines(before, after),
        sample=sample_rows,
        overlaps=neighbour_overlap(before, after, sample_rows, k=k),
        added=len(new_ids) - len(common_ids),
        removed=len(old_ids) - len(common_ids),
    )


def rotation(
    old: Float[np.ndarray, "N D"], new: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, "D D"]:
    """Returns the orthogonal R that makes the sum of squares of `old @ R - new` least.

    >>> turned = np.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> rotation(np.eye(2), turned).round(6).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    # In float64: from float32 vectors the result would be orthogonal to seven digits alone.
    matrix, _ = scipy.linalg.orthogonal_procrustes(old.astype(np.float64), new.astype(np.float64))
    return matrix


def aligned_cosines(
    old: Float[np.ndarray, "N C"], new: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, " N"]:
    """Returns the cosine of each row of `old` with the same of `new` after rotation.

    The rotation is the one that makes the mean cosine greatest. A narrower side gets further
    coordinates of 0. A vector of length 0 has cosine 0.
    """
    # At length 1, the rotation that brings vectors nearest is the one of the greatest cosines.
    width = max(old.shape[1], new.shape[1])
    old_unit = np.pad(_normalize(old), ((0, 0), (0, width - old.shape[1])))
    new_unit = np.pad(_normalize(new), ((0, 0), (0, width - new.shape[1])))
    rotated = old_unit @ rotation(old_unit, new_unit).astype(np.float32)
    # Rounding may leave a cosine a little beyond 1.
    return np.einsum("nd,nd->n", rotated, new_unit).clip(-1.0, 1.0)


def neighbour_overlap(
    old: Float[np.ndarray, "N C"],
    new: Float[np.ndarray, "N D"],
    rows: np.ndarray,
    *,
    k: int = NEIGHBOURS,
) -> Float[np.ndarray, " S"]:
    """Returns the share of nearest neighbours that entities have kept.

    Args:
        old: Vectors of the old version.
        new: Vectors of the new version.
        rows: Rows of the S entities, the same in both.
        k: Number of neighbours of greatest cosine.
    """
    k = min(k, len(old) - 1)  # an entity is no neighbour of its own
    itself = Ragged.from_pairs(np.arange(len(rows)), rows, num_rows=len(rows))

    def neighbours(vectors: np.ndarray) -> np.ndarray:
        unit = _normalize(vectors)
        return top_k(unit[rows], unit, k, exclude=itself)[1]

    before = neighbours(old)
    after = neighbours(new)
    # Every pair of ranks is compared: the order within a neighbourhood does not count.
    kept = (before[:, :, None] == after[:, None, :]).any(2)
    return kept.mean(1).astype(np.float32)


def format_drift(drift: Drift, *, max_names: int = 10) -> str:
    """Returns counts, a table of quantiles, and the entities that have moved furthest.

    Args:
        drift: Result of `compare`.
        max_names: Greatest number of entities to name.
    """
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
    table = format_table(rows, header, align="lr")
    furthest = np.argsort(drift.cosines, kind="stable")[:max_names]
    names = [f"{drift.ids[int(row)].as_py()} ({drift.cosines[row]:.3f})" for row in furthest]
    return "\n".join([", ".join(counts), table, f"Moved most: {', '.join(names)}."])


def plot(drift: Drift, path: str | os.PathLike, *, title: str) -> None:
    """Draws histograms of cosines and of neighbours kept.

    Args:
        drift: Result of `compare`.
        path: Image to write, whole or not at all; its suffix names the format.
        title: Title of the image.
    """
    with extra("plots", "a plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    path = Path(path)
    # Not by pyplot, which would look for a display and keep the figure for the whole process.
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    lowest = min(0.0, float(drift.cosines.min()))
    _histogram(left, drift.cosines, np.linspace(lowest, 1.0, 51), "cosine after alignment")
    # With ten neighbours there are eleven shares, each in the middle of a bin.
    share_bins = np.linspace(-0.05, 1.05, 12)
    _histogram(right, drift.overlaps, share_bins, "share of nearest neighbours kept")
    # The temporary file's suffix would not name the format.
    image_format = path.suffix.removeprefix(".") or "png"
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format=image_format)


def _histogram(axes: Axes, values: np.ndarray, bins: np.ndarray, label: str) -> None:
    """Draws one histogram with its median; `bins` are the edges."""
    axes.hist(values, bins=bins.tolist())
    median = float(np.median(values))
    axes.axvline(median, color="black", linewidth=1, label=f"median {median:.3f}")
    axes.set_xlabel(label)
    axes.set_ylabel("entities")
    axes.legend()


def _normalize(vectors: np.ndarray) -> np.ndarray:
    """Returns the rows at length 1; one of length 0 stays."""
    vectors = vectors.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-30)
