"""The ScaNN library itself: imported, built, saved and loaded without what it does to a process
that is not careful."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from twotower.core.errors import BadIndexError


def import_scann() -> Any:
    """ScaNN's searcher module.

    ScaNN loads a TensorFlow operation where TensorFlow is installed, and fails with every
    TensorFlow that it was not built with. The operation is not needed here, so TensorFlow is hidden
    while ScaNN is imported.
    """
    loaded = sys.modules.get("tensorflow")
    sys.modules["tensorflow"] = None
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise ImportError(
            f"ScaNN cannot be imported ({error}). Install scann (Linux), or use index=exact."
        ) from error
    finally:
        sys.modules.pop("tensorflow")
        if loaded is not None:
            sys.modules["tensorflow"] = loaded
    return scann_ops_pybind


def scann_version() -> str:
    return metadata.version("scann")


def build_searcher(vectors: np.ndarray, *, num_leaves: int, reorder: int) -> Any:
    """A searcher of greatest dot products.

    Args:
        vectors: float32 [N, D], finite.
        num_leaves: of the tree; 0 builds none.
        reorder: the most candidates that are scored anew; 0 compares whole vectors from the start,
            without hashing.
    """
    builder = import_scann().builder(vectors, 10, "dot_product")
    if num_leaves:
        # random_init=False: k-means++ gives the same tree each time, the default is seeded by the
        # clock.
        builder = builder.tree(
            num_leaves=num_leaves,
            num_leaves_to_search=num_leaves,
            training_sample_size=min(len(vectors), 250_000),
            min_partition_size=1,
            random_init=False,
        )
    if reorder:
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(reorder)
    else:
        builder = builder.score_brute_force()
    try:
        with captured_stderr():
            return builder.build()
    except (RuntimeError, ValueError) as error:
        raise BadIndexError(
            f"ScaNN cannot index vectors of shape {list(vectors.shape)}: {error}"
        ) from error


def load_searcher(folder: str | os.PathLike) -> Any:
    """The searcher that `save_searcher` wrote."""
    if (Path(folder) / "scann_docids.pkl").exists():
        raise BadIndexError(
            f"{folder}/scann_docids.pkl is a pickle, which is never written here and not read."
        )
    library = import_scann()
    try:
        with captured_stderr():
            return library.load_searcher(str(folder))
    except (RuntimeError, ValueError) as error:
        raise BadIndexError(f"{folder} holds no ScaNN index that can be read: {error}") from error


def save_searcher(searcher: Any, folder: str | os.PathLike) -> None:
    # Relative: absolute paths would break when the folder moves.
    with captured_stderr():
        searcher.serialize(str(folder), relative_path=True)


@contextlib.contextmanager
def captured_stderr() -> Iterator[None]:
    """Keeps ScaNN's own log lines, which no setting silences, out of the terminal: they go to the
    debug log."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            captured.seek(0)
            logging.debug("ScaNN: %s", captured.read().decode(errors="replace"))
