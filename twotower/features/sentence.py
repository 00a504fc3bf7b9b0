"""Text as the vector of a frozen sentence encoder.

Each distinct text is encoded once. The vectors of all texts are kept in the encoder and in the
bundle, and in a cache of files for other runs, so the model is needed for new texts alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.arrow import join_chunks, pc
from twotower.core.errors import ConfigError
from twotower.core.files import atomic
from twotower.core.install import install_line
from twotower.features.base import Fitted, TrainingColumn
from twotower.features.inputs import Input
from twotower.features.sentence_model import (
    SentenceModel,
    find_model,
    load_model,
    model_digest,
    model_width,
)
from twotower.features.text import TextColumns
from twotower.features.vocabulary import Vocabulary, as_strings

# Texts of one file of the cache: the most that a killed process loses.
_BLOCK_TEXTS = 2048
# Fewer texts than this are encoded and not kept: a file for each request would be no gain.
_MIN_CACHED_TEXTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceFeature(TextColumns):
    """Text as the vector of a frozen sentence encoder; `columns` are joined line by line.

    The extra "text" runs the model with ONNX Runtime, without PyTorch.

    Attributes:
        model: A sentence-transformers model with an `onnx/` folder: a folder of this machine, or
            its name on the Hugging Face Hub.
        prompt: Name of one of the model's own prompts, such as "document", or the text to put
            before each text, such as "passage: "; empty for the model's default.
        cache: Folder that keeps vectors, by model and text, for other runs; environment variables
            and ~ are expanded.
        embedding_size: Width of the dense layer between the vector and the tower, the only part
            that is trained; 0 for none.
    """

    # Small, and trained on some fifty languages.
    model: str = "paraphrase-multilingual-MiniLM-L12-v2"
    prompt: str = ""
    cache: str = "~/.cache/twotower/sentences"
    embedding_size: int = 64

    separator: ClassVar[str] = "\n"

    def __post_init__(self):
        super().__post_init__()
        self._check(bool(self.model.strip()), "model", "a folder or the name of a model")
        self._check(bool(self.cache.strip()), "cache", "a folder")

    @property
    def has_table(self) -> bool:
        return False

    def fit(self, column: TrainingColumn) -> Fitted:
        """Encodes all texts, also those of users or items that do not occur in training.

        Raises:
            ConfigError: The model is not found, is of a kind that is not supported, or the extra
                "text" is missing.
        """
        texts = pc.unique(as_strings(column.all_values)).drop_null()
        texts = texts.filter(_is_not_blank(texts))
        folder = find_model(self.model, self.location)
        # By content: a folder, or a name on the Hub, may hold another model tomorrow.
        sha256 = model_digest(folder, self.location, prompt=self.prompt)
        # From the configuration, so that a full cache needs no model to be loaded.
        width = model_width(folder, self.location)
        vectors = _vectors(self, texts, folder, sha256, width)
        return Fitted(Vocabulary(texts), vectors, statistics={"model": sha256})

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        """Encodes texts as vectors, new ones by the model; a missing or empty text has zeros.

        Raises:
            ConfigError: As for `fit`, or the model is another than the one that was fitted.
        """
        vocabulary = fitted.require_vocabulary()
        vectors = fitted.require_vectors()
        width = vectors.shape[1]
        texts = as_strings(column)
        rows = vocabulary.rows(texts) - vocabulary.first
        known = rows >= 0
        encoded = np.zeros((len(texts), width), np.float32)
        # Texts of fitting need no model: a server without the extra answers for known items.
        encoded[known] = vectors[rows[known]]
        new = ~known & _is_not_blank(texts).to_numpy(zero_copy_only=False)
        if new.any():
            # Each distinct text once: the model costs far more than a lookup.
            distinct = texts.filter(pa.array(new)).dictionary_encode()
            sha256 = fitted.statistics["model"]
            folder = _find_same_model(self, sha256)
            new_vectors = _vectors(self, distinct.dictionary, folder, sha256, width)
            encoded[new] = new_vectors[distinct.indices.to_numpy()]
        return encoded

    def input(self, fitted: Fitted) -> Input:
        width = fitted.require_vectors().shape[1]
        return Input(width=width, projection=self.embedding_size)

    def extend(self, old: Fitted, new: Fitted, vocabulary: Vocabulary) -> Fitted:
        # Vectors of two models in one column would mean nothing beside each other.
        if old.statistics != new.statistics:
            raise ConfigError(
                f"{self.location}.model={self.model!r} is another model now than the run to grow "
                "from read."
            )
        return super().extend(old, new, vocabulary)

    def serving_model(self, fitted: Fitted) -> dict[str, str]:
        return {"model": self.model, "sha256": fitted.statistics["model"]}

    def warn_of_missing_extra(self) -> None:
        """Warns that new texts cannot be encoded if the extra "text" is missing."""
        if not all(importlib.util.find_spec(module) for module in ("tokenizers", "onnxruntime")):
            logging.warning(
                "%s: new texts need model %r and the extra 'text' (%s), "
                "which is not installed; known ones have their vectors.",
                self.location,
                self.model,
                install_line("text"),
            )


def read_cache(
    cache: Path, texts: pa.LargeStringArray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the vectors of texts from the files of a cache.

    Args:
        cache: Folder of the files.
        texts: Distinct texts [N].
        width: Width of the vectors.

    Returns:
        A mask bool [N] of the texts that the cache holds, and their vectors, float32 [N, width]; 0
        for the others.

    Raises:
        ConfigError: A file is damaged.
    """
    known = np.zeros(len(texts), bool)
    vectors = np.zeros((len(texts), width), np.float32)
    # Sorted: of a text that two processes wrote, the same copy is taken each time.
    paths = sorted(cache.glob("*.parquet"))
    # Texts first, and vectors only of files that hold a wanted text.
    texts_of_files = [_read_column(path, "text") for path in paths]
    if not paths:
        return known, vectors
    indices = pc.index_in(texts, value_set=pa.concat_arrays(texts_of_files))
    indices = pc.fill_null(indices, -1).to_numpy()
    # Sorted by index, the texts of one file lie together, and each file is read at most once.
    order = np.argsort(indices, kind="stable")
    starts = np.cumsum([0, *map(len, texts_of_files)])
    bounds = np.searchsorted(indices[order], starts)
    for number, path in enumerate(paths):
        rows = order[bounds[number] : bounds[number + 1]]
        if len(rows):
            numbers = _read_column(path, "vector").flatten().to_numpy()
            vectors[rows] = numbers.reshape(-1, width)[indices[rows] - starts[number]]
            known[rows] = True
    return known, vectors


def _is_not_blank(texts: pa.LargeStringArray) -> pa.BooleanArray:
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False)


@functools.lru_cache
def _find_same_model(feature: SentenceFeature, sha256: str) -> Path:
    """Returns the folder of the model with that hash; it is hashed once in a process."""
    # The name of the model is in the specification, its content is not: it may have changed.
    folder = find_model(feature.model, feature.location)
    if model_digest(folder, feature.location, prompt=feature.prompt) != sha256:
        raise ConfigError(
            f"{feature.location}.model={feature.model!r}: {folder} is not the model that gave the "
            f"vectors of this encoder (sha256 {sha256[:12]}). Put that model in its place, or "
            "train again."
        )
    return folder


@functools.lru_cache(maxsize=2)
def _model(folder: Path, sha256: str, location: str, prompt: str) -> SentenceModel:
    # The hash is not read: with it, a model that was replaced is not taken from the memory.
    return load_model(folder, location, prompt=prompt)


def _vectors(
    feature: SentenceFeature, texts: pa.LargeStringArray, folder: Path, sha256: str, width: int
) -> np.ndarray:
    """Returns the vectors float32 [N, width] of distinct texts, from the cache or by the model."""
    if not len(texts):
        return np.zeros((0, width), np.float32)
    if len(texts) < _MIN_CACHED_TEXTS:
        model = _model(folder, sha256, feature.location, feature.prompt)
        return model.encode(texts.to_pylist())
    # A folder for each model and prompt, whose vectors never mix.
    cache = Path(os.path.expanduser(os.path.expandvars(feature.cache))) / sha256
    # What an earlier run, or a killed one, encoded.
    known, vectors = read_cache(cache, texts, width)
    new = np.flatnonzero(~known)
    start = time.monotonic()
    for low in range(0, len(new), _BLOCK_TEXTS):
        rows = new[low : low + _BLOCK_TEXTS]
        block = texts.take(pa.array(rows))
        # Loaded at the first new text alone; later calls get the loaded one.
        model = _model(folder, sha256, feature.location, feature.prompt)
        vectors[rows] = model.encode(block.to_pylist())
        # Block by block, so that a killed process goes on from the last one.
        _write_cache(cache, block, vectors[rows])
        done = low + len(rows)
        logging.info(
            "%s: %d of %d texts encoded, %.0f a second.",
            feature.location,
            done,
            len(new),
            done / (time.monotonic() - start),
        )
    return vectors


def _read_column(path: Path, column: str) -> pa.Array:
    try:
        # Checksums: a damaged page must not become a vector.
        table = pq.read_table(path, columns=[column], page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} of the cache of sentence vectors is damaged ({error}): delete it."
        ) from None
    return join_chunks(table[column])


def _write_cache(cache: Path, texts: pa.LargeStringArray, vectors: np.ndarray) -> None:
    """Writes one more file of the cache, or warns if the cache cannot be written."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    joined = "\0".join(texts.to_pylist()).encode("utf-8", "surrogatepass")
    # Named by content: two processes that encode the same texts write one file.
    name = hashlib.sha256(joined).hexdigest()[:32]
    table = pa.table({"text": texts, "vector": lists})
    try:
        with atomic(cache / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="none", write_page_checksum=True)
    except OSError as error:
        logging.warning(
            "%s: vectors of %d texts are not kept for other runs (%s).", cache, len(texts), error
        )
