"""Encoded arrays -> batches. Which rows a step sees is a function of (seed, step) alone, so that
any step can be resumed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from twotower.core.errors import ConfigError
from twotower.pipeline.histories import SPANS, Histories, windows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Interactions as arrays.

    Attributes:
        user: int32 [N], row of the users table.
        item: int32 [N], row of the corpus; -1 where the item is not in it (never so in training
            rows).
        weight: float32 [N], at least 0.
        timestamp: int64 [N], seconds since the epoch, or None.
        context: user features of the interaction itself, [N, ...] each.
        labels: column -> float32 [N], 1, 0, or NaN where missing; of the columns that
            `config.objective` names.
    """

    user: np.ndarray
    item: np.ndarray
    weight: np.ndarray
    timestamp: np.ndarray | None
    context: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows, by place or by mask."""
        return Rows(
            *jax.tree.map(
                lambda x: x[rows],
                tuple(getattr(self, field.name) for field in dataclasses.fields(self)),
            )
        )


Batch = dict[str, Any]


def gather(data: Mapping[str, Any], index: Any, *, length: int = 0) -> Batch:
    """The batch of the rows at `index`: {"user", "item", "weight": [B], "user_features",
    "item_features": {name: [B, ...]}, "labels": {column: [B], NaN where missing}}.

    Works on NumPy arrays, and inside `jit` on those that rest on the device.

    Args:
        length: L of the histories whose spans are in the context, if there are any.
    """
    user, item = data["user"][index], data["item"][index]
    user_features = {name: x[user] for name, x in data["user_features"].items()}
    context = {name: x[index] for name, x in data["context"].items()}
    if SPANS in context:
        context |= windows(data["events"], data["reads"], context.pop(SPANS), length)
    return {
        "user": user,
        "item": item,
        "weight": data["weight"][index],
        "user_features": user_features | context,
        "item_features": {name: x[item] for name, x in data["item_features"].items()},
        "labels": {name: x[index] for name, x in data["labels"].items()},
    }


class Batches:
    """Shuffled batches of B training rows.

    Step s takes the places [s B, (s + 1) B) of an endless stream, one shuffled pass over the rows
    after the other: every batch is full, so no shape changes and no row is dropped.

    Attributes:
        resident: the encoded arrays, where they fit in `resident_megabytes`; to be put on the
            device once, each batch then gathered there. Otherwise None, and `load` gathers on the
            host.
    """

    def __init__(
        self,
        rows: Rows,
        features: Mapping[str, Mapping[str, np.ndarray]],
        histories: Histories | None = None,
        *,
        batch_size: int,
        seed: int,
        resident_megabytes: int,
    ) -> None:
        data = {
            "user": rows.user,
            "item": rows.item,
            "weight": rows.weight,
            "context": dict(rows.context),
            "user_features": dict(features["user"]),
            "item_features": dict(features["item"]),
            "labels": dict(rows.labels),
        }
        self._length = histories.length if histories else 0
        if histories:
            data |= {"events": histories.training_events, "reads": histories.reads}
        self._begin(data, len(rows), "training rows", batch_size, seed, resident_megabytes)

    def _begin(
        self,
        data: dict[str, Any],
        rows: int,
        what: str,
        batch_size: int,
        seed: int,
        resident_megabytes: int,
    ) -> None:
        if batch_size > rows:
            raise ConfigError(
                f"config.training.batch_size={batch_size} is larger than the data: there are {rows} {what}. "
                f"Choose at most {rows}."
            )
        self._data, self._rows, self._batch_size, self._seed = data, rows, batch_size, seed
        size = sum(x.nbytes for x in jax.tree.leaves(self._data))
        self.resident = self._data if size <= resident_megabytes * 2**20 else None
        # A batch needs the pass it lies in, and the next one where it crosses the border.
        self._pass = functools.lru_cache(maxsize=2)(self._shuffle)

    def indices(self, step: int) -> np.ndarray:
        """int32 [B], the rows of batch `step`."""
        start = step * self._batch_size
        parts, needed = [], self._batch_size
        while needed:
            number, offset = divmod(start, self._rows)
            part = self._pass(number)[offset : offset + needed]
            parts.append(part)
            start, needed = start + len(part), needed - len(part)
        return np.concatenate(parts)

    @property
    def gather(self) -> Callable[[Mapping[str, Any], Any], Batch]:
        """(data, what `indices` gives) -> the batch, on the host or inside `jit`."""
        return functools.partial(gather, length=self._length)

    def load(self, indices: np.ndarray) -> Batch:
        """The rows at `indices`, gathered on the host."""
        return self.gather(self._data, indices)

    def _shuffle(self, number: int) -> np.ndarray:
        rows = np.arange(self._rows, dtype=np.int32)
        return np.random.default_rng((self._seed, number)).permutation(rows)
