"""Shapes and names of encoded features: what encoders and towers know of each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

# Names of the arrays that stand beside the items of a history.
HISTORY_TIME_SINCE_PREVIOUS = "history gap"
HISTORY_TIME_TO_NEXT = "history until"
HISTORY_WEIGHT = "history weight"
# Two more where whole sequences are packed into rows [B, S].
HISTORY_SEGMENT = "history segment"
HISTORY_POSITION = "history position"
# Three more where histories lie one after the other, as spans [M]: the row of the batch that each
# event belongs to, its number within the history, and the number of events of each row [B].
HISTORY_ROW = "history row"
HISTORY_SLOT = "history slot"
HISTORY_COUNT = "history count"
_BESIDE_ITEMS = (HISTORY_TIME_SINCE_PREVIOUS, HISTORY_TIME_TO_NEXT, HISTORY_WEIGHT)

# The two towers. Their order decides keys of random numbers: it never changes.
SIDES = ("user", "item")


@dataclasses.dataclass(frozen=True)
class Input:
    """The description of one encoded array for the tower that reads it.

    Attributes:
        table: Embedding table that the ids are rows of; empty for numbers.
        length: Ids L of each user or item [N, L], whose rows are averaged without padding (id 0);
            0 for single ids [N].
        width: Numbers of each user or item, float32 [N, width]; 0 for ids.
        projection: Width of a dense layer between the feature and the tower; 0 for none.
        oov_rate: Share of ids replaced by an out-of-vocabulary row in training.
        oov_rows: Number of out-of-vocabulary rows, 1 to `oov_rows` of the table.
        history_length: Events L of a history, whose arrays are [N, L, ...]; 0 for all else.
        time_buckets: Buckets of the time between events that are read beside the items of a
            history; only its first array has them.
        time_to_next: Whether the time to the next event is read too, in as many buckets.
    """

    table: str = ""
    length: int = 0
    width: int = 0
    projection: int = 0
    oov_rate: float = 0.0
    oov_rows: int = 0
    history_length: int = 0
    time_buckets: int = 0
    time_to_next: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class TableShape:
    """One embedding table, rows unpadded.

    Attributes:
        rows: Rows V, of which row 0 is padding.
        width: Embedding width E.
        initial: Rows float32 [V, E] to start from; None for random rows.
        norm: Expected norm of random rows.
    """

    rows: int
    width: int
    initial: np.ndarray | None = None
    norm: float = 1.0


def id_array(names: Iterable[str]) -> str:
    """Returns the name of the array that holds the ids of the items of a history.

    It is looked up rather than taken as the first: `jit` sorts dictionaries by name.
    """
    return next(name for name in names if name not in _BESIDE_ITEMS)
