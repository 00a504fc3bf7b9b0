"""Texts as the vectors of a frozen sentence encoder: each distinct text is encoded once, and kept
for other runs."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.files import atomic
from twotower.features.kinds import SentenceFeature
from twotower.features.sentence_model import (
    SentenceModel,
    find_model,
    load_model,
    model_digest,
    model_width,
)
from twotower.features.vocabulary import Vocabulary, as_strings

# Texts of one file of the cache: what a killed process loses. Fewer than _WORTH_KEEPING texts are
# encoded and not kept.
_BLOCK_TEXTS, _WORTH_KEEPING = 2048, 64


def fit_sentences(
    feature: SentenceFeature, column: pa.ChunkedArray
) -> tuple[Vocabulary, np.ndarray, str]:
    """The distinct texts of a column, their vectors float32 [V, E], and the SHA-256 of the model
    that gave them.

    Raises:
        ConfigError: the model is not found, is of a kind that is not supported, or the extra "text"
            is missing.
    """
    texts = pc.unique(as_strings(column)).drop_null()
    texts = texts.filter(_says_something(texts))
    folder = find_model(feature.model, feature.where)
    sha256, width = model_digest(folder, feature.where), model_width(folder, feature.where)
    return Vocabulary(texts), _vectors(feature, texts, folder, sha256, width), sha256


def encode_sentences(
    feature: SentenceFeature,
    vocabulary: Vocabulary,
    vectors: np.ndarray,
    sha256: str,
    column: pa.ChunkedArray,
) -> np.ndarray:
    """The vectors float32 [N, E] of texts, those that are new by the model; of a missing or empty
    one zeros.

    Raises:
        ConfigError: as `fit_sentences`, or the model that is found is another than that of
            `sha256`.
    """
    texts = as_strings(column)
    rows = vocabulary.rows(texts) - vocabulary.first
    encoded = np.zeros((len(texts), vectors.shape[1]), np.float32)
    encoded[rows >= 0] = vectors[rows[rows >= 0]]
    new = (rows < 0) & _says_something(texts).to_numpy(zero_copy_only=False)
    if new.any():
        distinct = texts.filter(pa.array(new)).dictionary_encode()
        folder = _same_model(feature, sha256)
        found = _vectors(feature, distinct.dictionary, folder, sha256, vectors.shape[1])
        encoded[new] = found[distinct.indices.to_numpy()]
    return encoded


def warn_of_missing_extra(feature: SentenceFeature) -> None:
    """Says at once that texts which are new cannot be encoded, where the extra is missing."""
    if not all(importlib.util.find_spec(module) for module in ("tokenizers", "safetensors")):
        logging.warning(
            "%s: new texts need model %r and the extra 'text' (pip install 'twotower[text]'), which is not installed; known "
            "ones have their vectors.",
            feature.where,
            feature.model,
        )


def _says_something(texts: pa.LargeStringArray) -> pa.BooleanArray:
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False)


@functools.lru_cache
def _same_model(feature: SentenceFeature, sha256: str) -> Path:
    """The folder of the model with that hash; found, and hashed, once in a process."""
    folder = find_model(feature.model, feature.where)
    if model_digest(folder, feature.where) != sha256:
        raise ConfigError(
            f"{feature.where}.model={feature.model!r}: {folder} is not the model that gave the vectors of this encoder (sha256 "
            f"{sha256[:12]}). Put that model in its place, or train again."
        )
    return folder


@functools.lru_cache(maxsize=2)
def _model(folder: Path, sha256: str, where: str) -> SentenceModel:
    return load_model(folder, where)


def _vectors(
    feature: SentenceFeature, texts: pa.LargeStringArray, folder: Path, sha256: str, width: int
) -> np.ndarray:
    """The vectors of distinct texts: from the cache, or by the model, and then put there."""
    if len(texts) < _WORTH_KEEPING:
        return (
            _model(folder, sha256, feature.where).encode(texts.to_pylist())
            if len(texts)
            else np.zeros((0, width), np.float32)
        )
    cache = Path(os.path.expanduser(os.path.expandvars(feature.cache))) / sha256
    known, vectors = read_cache(cache, texts, width)
    new, start = np.flatnonzero(~known), time.monotonic()
    for low in range(0, len(new), _BLOCK_TEXTS):
        rows = new[low : low + _BLOCK_TEXTS]
        block = texts.take(pa.array(rows))
        vectors[rows] = _model(folder, sha256, feature.where).encode(block.to_pylist())
        _write_cache(cache, block, vectors[rows])
        done = low + len(rows)
        rate = done / (time.monotonic() - start)
        logging.info(
            "%s: %d of %d texts encoded, %.0f a second.", feature.where, done, len(new), rate
        )
    return vectors


def read_cache(
    cache: Path, texts: pa.LargeStringArray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the texts are there, bool [N], and their vectors, float32 [N, width], 0 elsewhere.

    Raises:
        ConfigError: a file is damaged.
    """
    known, vectors = np.zeros(len(texts), bool), np.zeros((len(texts), width), np.float32)
    paths = sorted(cache.glob("*.parquet"))
    kept = [_read(path, "text") for path in paths]
    if not kept:
        return known, vectors
    ends = np.cumsum([len(part) for part in kept])
    places = pc.fill_null(pc.index_in(texts, value_set=pa.concat_arrays(kept)), -1).to_numpy()
    order = np.argsort(places, kind="stable")
    bounds = np.searchsorted(places[order], [0, *ends])
    for path, low, high, end, part in zip(paths, bounds[:-1], bounds[1:], ends, kept):
        if low < high:
            rows = order[low:high]
            lists = _read(path, "vector")
            vectors[rows] = (
                lists.flatten().to_numpy().reshape(-1, width)[places[rows] - end + len(part)]
            )
            known[rows] = True
    return known, vectors


def _read(path: Path, column: str) -> pa.Array:
    try:
        return pq.read_table(path, columns=[column], page_checksum_verification=True)[
            column
        ].combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} of the cache of sentence vectors is damaged ({error}): delete it."
        ) from None


def _write_cache(cache: Path, texts: pa.LargeStringArray, vectors: np.ndarray) -> None:
    """One more file, whole or not at all; a cache that cannot be written is done without."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    name = hashlib.sha256(
        "\0".join(texts.to_pylist()).encode("utf-8", "surrogatepass")
    ).hexdigest()[:32]
    table = pa.table({"text": texts, "vector": lists})
    try:
        with atomic(cache / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="none", write_page_checksum=True)
    except OSError as error:
        logging.warning(
            "%s: vectors of %d texts are not kept for other runs (%s).", cache, len(texts), error
        )
