"""Vectors that something else computed, read by id from a .npy or a Parquet file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.features.kinds import PretrainedFeature
from twotower.features.vocabulary import Vocabulary, as_strings


def read_vectors(feature: PretrainedFeature) -> tuple[Vocabulary, np.ndarray]:
    """The ids, in the order of the file, and their vectors float32 [V, E].

    Raises:
        ConfigError: the file cannot be read, its width is not `embedding_size`, an id comes twice,
            ids and vectors are not as many, or a vector is not finite. The message names the
            feature and the file.
    """
    path = _path(feature.path)
    where = f"{feature.where}: {path}"
    try:
        ids, vectors = (
            _read_npy(feature, path) if feature.ids else _read_parquet(feature, path, where)
        )
    except (OSError, ValueError) as error:
        raise (
            error
            if isinstance(error, ConfigError)
            else ConfigError(f"{where} cannot be read: {error}")
        ) from None
    _check_vectors(feature, vectors, where)
    _check_ids(ids, len(vectors), where)
    return Vocabulary(ids, oov_rows=feature.oov_rows), vectors.astype(np.float32)


def check_missing(
    feature: PretrainedFeature, vocabulary: Vocabulary, column: pa.ChunkedArray
) -> None:
    """Refuses users or items without a vector, unless `missing` is "zeros"; a null id has none."""
    values = as_strings(column)
    lacking = values.filter(pa.array(vocabulary.rows(values) < vocabulary.first))
    if len(lacking) and feature.missing == "error":
        distinct = pc.unique(lacking)
        raise ConfigError(
            f"{feature.where}: {feature.path} has no vector for {len(distinct)} of {len(pc.unique(values))} "
            f"ids in column {feature.column!r}, the first {_few(distinct.to_pylist())}; add them, or set missing to 'zeros'."
        )


def _path(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))


def _read_npy(feature: PretrainedFeature, path: Path) -> tuple[pa.LargeStringArray, np.ndarray]:
    lines = _path(feature.ids).read_text("utf-8").splitlines()
    return pa.array(lines, pa.large_string()), np.load(path, allow_pickle=False)


def _read_parquet(
    feature: PretrainedFeature, path: Path, where: str
) -> tuple[pa.LargeStringArray, np.ndarray]:
    check_fields(
        dict.fromkeys((feature.id_column, feature.vector_column)), pq.read_schema(path).names, where
    )
    table = pq.read_table(path, columns=sorted({feature.id_column, feature.vector_column}))
    lists = table[feature.vector_column].combine_chunks()
    if not (
        pa.types.is_list(lists.type)
        or pa.types.is_large_list(lists.type)
        or pa.types.is_fixed_size_list(lists.type)
    ):
        raise ConfigError(
            f"{where}: column {feature.vector_column!r} is of type {lists.type}, not lists of numbers."
        )
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    if len(np.unique(lengths)) > 1:
        odd = int(np.flatnonzero(lengths != lengths[0])[0])
        raise ConfigError(
            f"{where}: the vector in row {odd} has width {lengths[odd]}, that in row 0 has {lengths[0]}."
        )
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return as_strings(table[feature.id_column]), flat.reshape(len(lists), -1) if len(
        lists
    ) else np.zeros((0, 0), np.float32)


def _check_vectors(feature: PretrainedFeature, vectors: np.ndarray, where: str) -> None:
    if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind not in "fiu":
        raise ConfigError(
            f"{where} holds {vectors.dtype} of shape {vectors.shape}, not one row of numbers for each id."
        )
    if feature.embedding_size not in (0, vectors.shape[1]):
        raise ConfigError(
            f"{where} holds vectors of width {vectors.shape[1]}, but embedding_size={feature.embedding_size}; "
            f"set it to {vectors.shape[1]} or 0, and projection for another width."
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"{where} holds NaN or infinity in {len(bad)} vectors, the first in row {bad[0]}."
        )


def _check_ids(ids: pa.LargeStringArray, rows: int, where: str) -> None:
    if len(ids) != rows:
        raise ConfigError(
            f"{where} holds {rows} vectors for {len(ids)} ids; there must be one id for each row."
        )
    if ids.null_count:
        raise ConfigError(f"{where} holds {ids.null_count} vectors without an id.")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if twice:
        raise ConfigError(
            f"{where} holds {len(twice)} ids more than once, the first {_few(twice)}."
        )


def _few(values: Sequence[str | None], count: int = 5) -> str:
    return ", ".join(repr(value) for value in values[:count])
