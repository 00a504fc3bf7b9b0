"""What training knows of the whole corpus: how much there is, how often each thing occurs, what
negatives are drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from twotower.core.mesh import REPLICATED, put
from twotower.objectives.alias import popularity_table
from twotower.objectives.pools import explicit_pools
from twotower.pipeline.prepare import PreparedData
from twotower.training.candidates import CorpusSize
from twotower.training.state import Trainer


def make_catalogue(
    trainer: Trainer, prepared: PreparedData, mesh: Mesh, resident: Any
) -> dict[str, Any]:
    """What the step needs of the corpus; see `train_step`."""
    config, found = trainer.sources.config, {}
    if trainer.sources.needs_features:
        given = (
            resident["item_features"]
            if resident
            else put(mesh, dict(prepared.features["item"]), REPLICATED)
        )
        found["item_features"] = given
    if config.popularity:
        found["popularity"] = put(
            mesh, popularity_table(count_rows(prepared)["item"], config.alpha), REPLICATED
        )
    if config.explicit:
        found["explicit"] = put(mesh, _explicit(trainer, prepared), REPLICATED)
    return found


def _explicit(trainer: Trainer, prepared: PreparedData) -> Any:
    labels = prepared.train.labels[trainer.config.objective.label]
    return explicit_pools(prepared.train, labels, num_users=len(prepared.users))


def count_rows(prepared: PreparedData) -> dict[str, np.ndarray]:
    """Training rows of each user, of each item of the corpus, and in all, float32.

    Of sequences, how often a pass has each as a target; "in all" are then the places, filled or
    not, that a pass has.
    """
    sizes, plan = {"user": len(prepared.users), "item": len(prepared.items)}, prepared.plan
    rates, rows = None, len(prepared.train)
    if plan is not None:
        rates, rows = np.zeros(rows), len(plan) * plan.places
        rates[prepared.histories.orders["train"]] = plan.rates(len(rates))
    counts = {
        side: np.bincount(getattr(prepared.train, side), rates, minlength=n)
        for side, n in sizes.items()
    }
    return {side: x.astype(np.float32) for side, x in counts.items()} | {"rows": np.float32(rows)}


def corpus_size(prepared: PreparedData) -> CorpusSize:
    """How much there is."""
    return CorpusSize(
        len(prepared.users), len(prepared.items), int((count_rows(prepared)["item"] == 0).sum())
    )
