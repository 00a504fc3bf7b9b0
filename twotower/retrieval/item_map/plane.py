"""The item vectors as points of a plane: principal components, and a map to move in."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.index.exact import top_k

MAP_ITEMS = 3_000  # items of the map; more would not fit in a page that may be sent by mail
COLOURS = 8  # colours and shapes that can be told apart
NEIGHBOURS = 8  # items that the map names beside a chosen one
FIT_ROWS = 100_000  # items that the components are fitted on
FEWEST_VALUES = 3  # distinct values of a column that is worth a picture
MOST_VALUES = 60
MOST_ALIKE = 0.9  # share of the items that one colour may have
# Words in the name of a column that says what an item is, the best first.
TITLE_WORDS = ("title", "name", "description")
_PACKAGE = "twotower.retrieval.item_map"
OTHERS = "others"
NOTHING = "(none)"


@dataclasses.dataclass(frozen=True)
class Plane:
    """Items as points.

    Attributes:
        points: Positions, float32 [N, 2].
        shares: Share of the variance of all D numbers that each axis shows, two numbers.
    """

    points: np.ndarray
    shares: tuple[float, float]


def project(vectors: np.ndarray) -> Plane:
    """Projects vectors on the two directions in which they differ most.

    Args:
        vectors: float32 [N, D], at least one.
    """
    rows = evenly_spaced(np.arange(len(vectors)), FIT_ROWS)
    sample = vectors[rows].astype(np.float64)
    # In float64: the variances of 100,000 numbers are added up.
    mean = sample.mean(0)
    covariance = np.cov(sample - mean, rowvar=False, bias=True).reshape(2 * [vectors.shape[1]])
    values, directions = np.linalg.eigh(covariance)
    directions = directions[:, ::-1][:, :2]
    # The sign of a direction means nothing; a fixed one makes equal runs equal pictures.
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    points = np.zeros((len(vectors), 2), np.float32)
    # Vectors of one number have one direction, and lie on a line.
    points[:, : directions.shape[1]] = (vectors - mean) @ directions
    total = max(float(values.sum()), 1e-30)
    shares = [float(value) / total for value in values[::-1][:2]]
    shares += [0.0] * (2 - len(shares))
    return Plane(points, (shares[0], shares[1]))


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Items by the values of a column.

    Attributes:
        column: Name of the column.
        labels: Names of the groups; the last may be all other values.
        groups: Group of each item, uint8 [N].
    """

    column: str
    labels: tuple[str, ...]
    groups: np.ndarray


def choose_columns(items: pa.Table, named: Sequence[str], counts: np.ndarray) -> list[Grouping]:
    """Returns the groupings that pictures are coloured by.

    Args:
        items: Table of the items.
        named: Names of columns; () takes the first two texts that have few values, and popularity
            where there are less than two.
        counts: Training rows of each item, int64 [N].

    Raises:
        ConfigError: A column is not in the table; the message names the nearest.
    """
    if named:
        known = {name: name for name in items.column_names}
        columns = [choose(known, name, "--report_columns") for name in named]
        return [group_items(name, items[name]) for name in columns]
    found = []
    for name in items.column_names:
        if name == "item_id" or not is_text(items[name].type):
            continue
        # Two values hardly divide a picture, and many look like none.
        if FEWEST_VALUES <= pc.count_distinct(items[name]).as_py() <= MOST_VALUES:
            grouping = group_items(name, items[name])
            # Nor does one that nearly all items share.
            if np.bincount(grouping.groups).max() <= MOST_ALIKE * len(items):
                found.append(grouping)
        if len(found) == 2:
            return found
    return [*found, group_popularity(counts)]


def group_items(name: str, column: pa.ChunkedArray) -> Grouping:
    """Returns items by the values of a column: the most frequent ones, and all others.

    Numbers of many values are divided into fifths of the items. Of lists the first member counts.

    Raises:
        ConfigError: The column holds what cannot be shown by colour.
    """
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    # A colour for each price says nothing; one for cheap and dear does.
    if is_number and pc.count_distinct(column).as_py() > COLOURS:
        return _group_fifths(name, column.cast(pa.float64()).to_numpy())
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        raise ConfigError(f"--report_columns={name}: it holds {kind}, which is no category.")
    values = [_text_of(value) for value in column.to_pylist()]
    names, codes, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    # The last colour is that of all others.
    kept = order if len(order) <= COLOURS else order[: COLOURS - 1]
    groups = np.full(len(names), len(kept), np.uint8)
    groups[kept] = np.arange(len(kept))
    labels = [str(names[row]) for row in kept]
    if len(kept) < len(order):
        labels.append(f"{OTHERS} ({len(order) - len(kept)})")
    return Grouping(name, tuple(labels), groups[codes])


def group_popularity(counts: np.ndarray) -> Grouping:
    """Returns items by how often they were in training, in fifths."""
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    fifth = rank * 5 // max(len(counts), 1)
    labels = ("least popular", "second fifth", "third fifth", "fourth fifth", "most popular")
    return Grouping("popularity", labels, fifth.astype(np.uint8))


def _group_fifths(name: str, values: np.ndarray) -> Grouping:
    known = values[np.isfinite(values)]
    edges = np.unique(np.quantile(known, [0.2, 0.4, 0.6, 0.8])) if len(known) else np.zeros(1)
    groups = np.searchsorted(edges, values, side="left")
    bounds = [f"{edge:.4g}" for edge in edges]
    labels = [f"up to {bounds[0]}"]
    labels += [f"{low} to {high}" for low, high in zip(bounds, bounds[1:])]
    labels.append(f"above {bounds[-1]}")
    groups = np.where(np.isfinite(values), groups, len(labels))
    if len(known) < len(values):
        labels.append(NOTHING)
    return Grouping(name, tuple(labels), groups.astype(np.uint8))


def map_data(
    plane: Plane, grouping: Grouping, titles: Sequence[str], vectors: np.ndarray, rows: np.ndarray
) -> dict[str, Any]:
    """Returns what map.js reads.

    Args:
        plane: Positions of all items.
        grouping: Colours of all items.
        titles: Titles of the items of the map.
        vectors: Vectors of all items, float32 [N, D].
        rows: Items of the map, int [M], at most `MAP_ITEMS`.
    """
    points = plane.points[rows].astype(np.float64)
    low = points.min(0)
    # One scale for both axes: distances are those of the plane.
    extent = max(float((points.max(0) - low).max()), 1e-30)
    middle = (points.max(0) + low) / 2
    shares = (points - middle) / extent + 0.5
    # Whole numbers of two bytes: a page of 3,000 items stays small, and no screen shows more.
    places = np.round(np.clip(shares, 0, 1) * 65_535).astype("<u2")
    # An item is no neighbour of itself.
    count = min(NEIGHBOURS, len(rows) - 1)
    return {
        "titles": list(titles),
        "labels": list(grouping.labels),
        "places": _base64(places),
        "groups": _base64(grouping.groups[rows].astype(np.uint8)),
        # By the whole vectors: what lies close in two dimensions need not be alike.
        "nearest": _base64(nearest_rows(vectors[rows], count).astype("<u2")),
        "count": count,
    }


def map_script() -> str:
    """Returns the script of the map: `showItemMap(data, onChoose)` draws what `map_data` made."""
    return resources.files(_PACKAGE).joinpath("map.js").read_text(encoding="utf-8")


def title_column(columns: Sequence[str]) -> str:
    """Returns the column that is called a title, or else a name or a description, or else ""."""
    for word in TITLE_WORDS:
        for name in columns:
            if word in name.lower():
                return name
    return ""


def item_titles(items: pa.Table, display: Sequence[str]) -> list[str]:
    """Returns the title of each item: a column that is called so, or else its id.

    Args:
        items: Table of the items.
        display: Columns that lists show, which are looked at first.
    """
    ids = items["item_id"].to_pylist()
    known = [name for name in (*display, *items.column_names) if name in items.column_names]
    name = title_column(known)
    if not name:
        return [str(item) for item in ids]
    titles = items[name].to_pylist()
    return [item if not title else str(title) for item, title in zip(ids, titles)]


def nearest_rows(vectors: np.ndarray, count: int) -> np.ndarray:
    """Returns the `count` vectors of greatest cosine to each, without itself: int [M, count]."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.maximum(lengths, 1e-30)
    _, found = top_k(directions, directions, min(count + 1, len(vectors)))
    found = np.asarray(found)
    is_itself = found == np.arange(len(found))[:, None]
    # Of equal vectors another one may stand in its own place: then the last of the list goes.
    is_itself[~is_itself.any(1), -1] = True
    return found[~is_itself].reshape(len(found), -1)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _text_of(value: object) -> str:
    if isinstance(value, list):
        value = value[0] if value else None
    return NOTHING if value in (None, "") else str(value)


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
