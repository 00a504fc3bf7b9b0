"""The work of a step of a run, where the peaks of its devices are known."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from twotower.pipeline.prepare import PreparedData
from twotower.training.monitoring.monitor import Monitoring
from twotower.training.monitoring.rates import Rates, device_name, find_kind
from twotower.training.planning.plan import step_cost
from twotower.training.planning.shapes import prepared_shapes
from twotower.training.state import Trainer


def with_rates(
    monitoring: Monitoring, trainer: Trainer, data: PreparedData, mesh: Mesh
) -> Monitoring:
    """Returns what is watched with the work of a step, where the peaks of the devices are known.

    Args:
        monitoring: What is watched.
        trainer: Model, loss and optimizers.
        data: Prepared data.
        mesh: Devices of the run.
    """
    kind = find_kind(device_name(), monitoring.kind)
    if not kind:
        return monitoring
    # A trace of the step, of which nothing is compiled.
    cost = step_cost(trainer, prepared_shapes(data), mesh.size)
    rates = Rates(kind, trainer.config.model.dtype, cost)
    return dataclasses.replace(monitoring, rates=rates.of_step)
