"""What tuning found for an index, and how hard a search for a list of any length is to look."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from twotower.index.tuning import Effort, Trial


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a ScaNN index is searched, and what that was measured to find.

    Attributes:
        kind: a key of `twotower.index.scann.KINDS`.
        num_items, dim: of the vectors.
        normalized: the vectors have length 1, so that a query of length 0 is a mistake.
        num_leaves: of the tree; 0 without one.
        target_recall: of the exact lists.
        efforts: by rising list length; () where the search is exhaustive.
        recall_by_decile: see `tuning.tune`.
        tried: every setting that was tried.
    """

    kind: str
    num_items: int
    dim: int
    normalized: bool
    num_leaves: int = 0
    target_recall: float = 1.0
    efforts: tuple[Effort, ...] = ()
    recall_by_decile: tuple[float | None, ...] = ()
    tried: tuple[Trial, ...] = dataclasses.field(
        default=(), compare=False
    )  # with speeds, which no two builds share

    @classmethod
    def of(cls, info: dict[str, Any]) -> Tuning:
        """From what `save_index` wrote."""
        values = {field.name: info[field.name] for field in dataclasses.fields(cls)}
        values |= {
            "efforts": tuple(Effort(**effort) for effort in info["efforts"]),
            "tried": tuple(Trial(**trial) for trial in info["tried"]),
            "recall_by_decile": tuple(info["recall_by_decile"]),
        }
        return cls(**values)

    @property
    def hashed(self) -> bool:
        return self.kind == "scann_tree_ah"

    def effort(self, k: int) -> tuple[int, int]:
        """(leaves, candidates scored anew) of a search for `k` items: between two tuned lengths,
        between their efforts."""
        above = next((e for e in self.efforts if e.k >= k), self.efforts[-1])
        below = next((e for e in reversed(self.efforts) if e.k <= k), above)
        if above.k > below.k:
            share = math.log(k / below.k) / math.log(above.k / below.k)
            between = ((below.leaves, above.leaves), (below.reorder, above.reorder))
            leaves, reorder = (low * (high / low) ** share if low else 0 for low, high in between)
        else:
            leaves, reorder = (max(1.0, k / above.k) * x for x in (above.leaves, above.reorder))
        return min(self.num_leaves, math.ceil(leaves - 1e-9)), min(
            self.num_items, math.ceil(reorder - 1e-9)
        )
