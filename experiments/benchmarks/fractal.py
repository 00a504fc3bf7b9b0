"""A log of any length with the users, films and tastes of MovieLens-100K, expanded fractally.

The matrix of users and films is multiplied, in the sense of Kronecker, with a small matrix that
has its leading singular values (Belletti et al., Scalable Realistic Recommendation Datasets
through Fractal Expansions, arXiv 1901.08910): each entry of the small one becomes a copy of the
large one, with its users and its films in an order of its own, of which it keeps as large a share
of the ratings as the entry says. Popularity and activity keep their long tails.

The copies are written one row of them after the other, so that memory does not grow with the rows.
A rating keeps its time: the log is in no order, and many rows share a second. Ids are text.
`epoch.py` writes and reads such a log.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from twotower.core.arrow import pc

# Copies of the films beside each other: 13,456 films.
_FILM_COPIES = 8
# Singular values that the small matrix keeps.
_RANK = 8


class Ratings(NamedTuple):
    """Ratings of a log.

    Attributes:
        user: int64 [N], number of the user, from 0.
        item: int64 [N], number of the film, from 0.
        time: int64 [N], seconds since the epoch.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray


def write_films(path: Path, rows: int, *, seed: int = 0) -> int:
    """Writes an expanded log with user_id, item_id and timestamp, and returns its rows.

    Args:
        path: Parquet file to write.
        rows: Number of rows wanted; as each rating is kept by chance there are some more or less.
        seed: Seed of the draws.
    """
    ratings = read_ratings()
    shares = shares_of_copies(ratings, rows)
    written = 0
    writer = None
    for copies in expand(ratings, shares, seed):
        part = pa.table(
            {
                "user_id": _ids("u", copies.user),
                "item_id": _ids("i", copies.item),
                "timestamp": copies.time,
            }
        )
        if writer is None:
            writer = pq.ParquetWriter(path, part.schema)
        writer.write_table(part)
        written += len(part)
    assert writer is not None
    writer.close()
    return written


def read_ratings() -> Ratings:
    """Reads MovieLens-100K from the folder in TWOTOWER_DATA."""
    path = Path(os.environ["TWOTOWER_DATA"]) / "movielens-100k" / "u.data"
    columns = csv.read_csv(
        path,
        read_options=csv.ReadOptions(column_names=["user", "item", "rating", "time"]),
        parse_options=csv.ParseOptions(delimiter="\t"),
    )
    arrays = [columns[name].to_numpy() for name in ("user", "item", "time")]
    # Numbers there begin at 1.
    return Ratings(arrays[0] - 1, arrays[1] - 1, arrays[2])


def shares_of_copies(ratings: Ratings, rows: int) -> np.ndarray:
    """Returns the share of the ratings that each copy keeps, float64 [R, C].

    Args:
        ratings: Ratings that are copied.
        rows: Number of rows that all copies are to have together.

    Raises:
        ValueError: There are not as many users as such a matrix would need rows.
    """
    needed = rows / len(ratings.user)
    matrix = np.zeros((ratings.user.max() + 1, ratings.item.max() + 1))
    matrix[ratings.user, ratings.item] = 1
    # Of the users' products with each other: far less work than the decomposition of the matrix.
    squares, users = np.linalg.eigh(matrix @ matrix.T)
    values = np.sqrt(squares[-_RANK:])
    users = users[:, -_RANK:]
    films = matrix.T @ users / values
    small_films = _reduce(films, _FILM_COPIES)
    for copies in range(_RANK, len(matrix) + 1):
        small = (_reduce(users, copies) * values) @ small_films.T
        small -= small.min()
        small /= small.max()
        if small.sum() >= needed:
            return small * (needed / small.sum())
    raise ValueError(f"{rows:,} rows need more copies than MovieLens-100K has users.")


def expand(ratings: Ratings, shares: np.ndarray, seed: int) -> Iterator[Ratings]:
    """Yields the ratings of one row of copies after the other.

    Args:
        ratings: Ratings that are copied.
        shares: Share of them that each copy keeps, float64 [R, C].
        seed: Seed of the draws.
    """
    num_users = ratings.user.max() + 1
    num_items = ratings.item.max() + 1
    rng = np.random.default_rng(seed)
    for row, of_row in enumerate(shares):
        parts = []
        for column, share in enumerate(of_row):
            kept = rng.random(len(ratings.user)) < share
            # An order of its own, or all copies would be of the same tastes.
            user = rng.permutation(num_users)[ratings.user[kept]]
            item = rng.permutation(num_items)[ratings.item[kept]]
            part = (user + row * num_users, item + column * num_items, ratings.time[kept])
            parts.append(part)
        yield Ratings(*map(np.concatenate, zip(*parts)))


def _reduce(vectors: np.ndarray, rows: int) -> np.ndarray:
    """Returns orthonormal vectors of fewer rows, each the mean of some that follow each other.

    Args:
        vectors: Orthonormal columns [N, K].
        rows: Number of rows, K to N.
    """
    means = [part.mean(axis=0) for part in np.array_split(vectors, rows)]
    orthonormal, triangle = np.linalg.qr(np.stack(means))
    # Signs as they were: those of a factorization are arbitrary.
    return orthonormal * np.sign(np.diag(triangle))


def _ids(letter: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")
