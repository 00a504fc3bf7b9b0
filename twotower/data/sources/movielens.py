"""Readers of MovieLens 100K and 1M in their own formats, which hold demographic data of users.

Both are read by the reader of CSV files: TFDS's parsers of them need TensorFlow. The tables have
the columns and the words that TFDS gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from twotower.config import TableConfig
from twotower.data.sources import files

# Genres of u.item, one column of 0 or 1 each, in the order of the file.
GENRES_100K = (
    "Unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
# Occupations of users.dat, by their number.
OCCUPATIONS_1M = (
    "other/not specified",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
# All other columns are text, such as zip codes.
_TYPES = {"rating": pa.float32(), "timestamp": pa.int64(), "age": pa.int64()}
RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")


class Tables(NamedTuple):
    """The tables of a MovieLens data set.

    Attributes:
        interactions: user_id, item_id, rating, timestamp.
        users: user_id and, in 100K and 1M, gender, age, occupation, zip.
        items: item_id, title, genres (list of names).
    """

    interactions: pa.Table
    users: pa.Table
    items: pa.Table


def read_100k(folder: Path) -> Tables:
    """Reads u.data, u.user and u.item."""
    ratings = _read(folder / "u.data", "\t", RATING_COLUMNS)
    users = _read(folder / "u.user", "|", ("user_id", "age", "gender", "occupation", "zip"))
    movie_columns = ("item_id", "title", "released", "video", "address")
    movies = _read(folder / "u.item", "|", (*movie_columns, *GENRES_100K))
    genres = []
    for flags in movies.select(GENRES_100K).to_pylist():
        genres.append([genre for genre, flag in flags.items() if flag == "1"])
    return _tables(ratings, users, movies, genres)


def read_1m(folder: Path) -> Tables:
    """Reads ratings.dat, users.dat and movies.dat."""
    ratings = _read(folder / "ratings.dat", "::", RATING_COLUMNS)
    users = _read(folder / "users.dat", "::", ("user_id", "gender", "age", "occupation", "zip"))
    # 1M writes numbers, 100K and TFDS write words.
    occupations = [OCCUPATIONS_1M[int(number)] for number in users["occupation"].to_pylist()]
    index = users.column_names.index("occupation")
    users = users.set_column(index, "occupation", pa.array(occupations))
    movies = _read(folder / "movies.dat", "::", ("item_id", "title", "genres"))
    # 1M alone writes "Children's".
    texts = [text.replace("Children's", "Children") for text in movies["genres"].to_pylist()]
    genres = [text.split("|") for text in texts]
    return _tables(ratings, users, movies, genres)


# Size -> reader of the folder that the archive holds.
READERS: dict[str, Callable[[Path], Tables]] = {"100k": read_100k, "1m": read_1m}


def _read(path: Path, delimiter: str, names: tuple[str, ...]) -> pa.Table:
    # Titles with accents are in latin-1 in both sizes; the files have no header.
    config = TableConfig(path=str(path), delimiter=delimiter, names=names, encoding="latin-1")
    # Suffixes such as .user and .item are of no known kind, so they are read as CSV.
    table, _ = files.read_raw(config, "interactions", "csv")
    for name, kind in _TYPES.items():
        if name in names:
            table = table.set_column(names.index(name), name, table[name].cast(kind))
    return table


def _tables(
    ratings: pa.Table, users: pa.Table, movies: pa.Table, genres: list[list[str]]
) -> Tables:
    # One order for both sizes, whose files order them differently.
    columns = ["user_id", "gender", "age", "occupation", "zip"]
    items = {
        "item_id": movies["item_id"],
        "title": movies["title"],
        "genres": pa.array(genres, pa.list_(pa.string())),
    }
    return Tables(
        interactions=ratings.select(RATING_COLUMNS),
        users=users.select(columns),
        items=pa.table(items),
    )
