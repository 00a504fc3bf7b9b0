"""The state of training: arrays only, so that it is the checkpoint."""

from __future__ import annotations

from typing import Any

import flax.struct

from twotower.towers.two_tower import Weights


@flax.struct.dataclass
class TrainState:
    """What a step takes and gives.

    Attributes:
        step: int32 scalar, steps done.
        params: dense parameters, see `Weights`.
        tables: embedding tables, see `Weights`.
        batch_stats: running statistics, see `Weights`.
        opt_state: the dense optimizer's, and the plateau schedule's.
        table_slots: table name -> the sparse optimizer's arrays.
        frequency: {"user": float32 [U], "item": float32 [N], "rows": float32 scalar}, training rows of each and in all.
    """

    step: Any
    params: Any
    tables: Any
    batch_stats: Any
    opt_state: Any
    table_slots: Any
    frequency: Any

    @property
    def weights(self) -> Weights:
        return Weights(self.params, self.tables, self.batch_stats)
