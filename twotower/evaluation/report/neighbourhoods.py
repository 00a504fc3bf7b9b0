"""The item vectors by UMAP, beside their principal components: a picture that keeps neighbours."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from twotower.core.arrays import evenly_spaced
from twotower.core.install import extra
from twotower.evaluation.report.figures import scatter_chart
from twotower.evaluation.report.page import Chart, Table
from twotower.evaluation.report.vectors import DRAWN_ITEMS, group_points, group_rows
from twotower.retrieval.item_map.plane import Grouping, Plane

FLAG = "--report_umap"
FITTED_ITEMS = 20_000  # items that are placed: of more it takes minutes
NEIGHBOURS = 15  # neighbours that are kept together, UMAP's own default


def check_umap() -> None:
    """Refuses, before anything is measured, a picture that could not be made.

    Raises:
        ConfigError: UMAP is missing; the message names the extra to install.
    """
    _import_umap()


def umap_charts(groupings: Sequence[Grouping], vectors: np.ndarray) -> list[Chart]:
    """Returns a picture by UMAP for each column that the items are coloured by.

    McInnes, Healy and Melville, UMAP: uniform manifold approximation and projection for dimension
    reduction, 2018, arXiv 1802.03426.

    Args:
        groupings: Columns to colour by.
        vectors: Vectors of all items, float32 [N, D].
    """
    rows = evenly_spaced(np.arange(len(vectors)), FITTED_ITEMS)
    # Among two or three items nothing is near or far.
    if len(rows) <= 3:
        return []
    # Shares of variance are of components alone.
    plane = Plane(_lay_out(vectors[rows]), (0.0, 0.0))
    drawn = evenly_spaced(np.arange(len(rows)), DRAWN_ITEMS)
    sample = ""
    if len(drawn) < len(vectors):
        sample = (
            f" A sample: {len(drawn):,} of {len(vectors):,} items are drawn, of {len(rows):,} that "
            "were placed."
        )
    made = []
    for number, grouping in enumerate(groupings):
        drawn_grouping = Grouping(grouping.column, grouping.labels, grouping.groups[rows])
        svg = scatter_chart(
            f"umap{number}",
            group_points(drawn_grouping, plane, drawn),
            x_label="UMAP axis 1 (no unit)",
            y_label="UMAP axis 2 (no unit)",
            small=True,
        )
        caption = (
            "Each point is an item; UMAP bends the space so that nearest neighbours (by cosine) "
            "stay together. Which items are close can be read from it; how far groups are apart, "
            f"and how large they look, means nothing.{sample}"
        )
        title = f"Neighbourhoods by {grouping.column} (UMAP)"
        counts = np.bincount(drawn_grouping.groups, minlength=len(drawn_grouping.labels))
        header = [grouping.column, "items", "mean of axis 1", "mean of axis 2"]
        table = Table(header, group_rows(drawn_grouping, plane, counts), title)
        made.append(Chart(f"umap{number}", title, svg, caption, table))
    return made


def _lay_out(vectors: np.ndarray) -> np.ndarray:
    """Returns the positions of vectors, float32 [M, 2], the same for the same vectors."""
    umap = _import_umap()
    neighbours = min(NEIGHBOURS, len(vectors) - 1)
    # Its spectral start needs more points than it has for a handful.
    start = "spectral" if len(vectors) > 2 * NEIGHBOURS else "random"
    reducer = umap.UMAP(
        n_neighbors=neighbours, metric="cosine", init=start, random_state=0, n_jobs=1
    )
    with warnings.catch_warnings():
        # For nearly equal vectors UMAP warns by the internals of its neighbour graph.
        warnings.simplefilter("ignore")
        return np.asarray(reducer.fit_transform(vectors), np.float32)


def _import_umap() -> Any:
    # By its name: it has no types, and is in no environment that types are checked in.
    with extra("umap", FLAG):
        return importlib.import_module("umap")
