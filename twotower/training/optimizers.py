"""Optax for the dense parameters, a sparse optimizer for the tables, and the schedule that both
follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import ReduceLROnPlateauState, reduce_on_plateau

from twotower.config import DenseOptimizerConfig, ScheduleConfig, TrainingConfig
from twotower.core.errors import choose
from twotower.core.kinds import Kinds
from twotower.kernels.sparse_update import Scalar, TableOptimizer
from twotower.kernels.table_optimizers import TABLE_OPTIMIZERS


@runtime_checkable
class DenseRates(Protocol):
    """The numbers of a dense optimizer: those of the configuration, or arguments of the step."""

    @property
    def learning_rate(self) -> Scalar: ...

    @property
    def weight_decay(self) -> Scalar: ...


# By the names that `config.training.optimizer.kind` takes. An optimizer of a user's module gets
# the `DenseOptimizerConfig`.
DENSE: Kinds[Callable[[Any], optax.GradientTransformation]] = Kinds(
    "optimizer",
    {
        "adam": lambda c: optax.adam(c.learning_rate),
        # The schedule multiplies the whole update, its weight decay included.
        "adamw": lambda c: optax.adamw(c.learning_rate, weight_decay=c.weight_decay, mask=_kernels),
        "adagrad": lambda c: optax.adagrad(c.learning_rate),
        "sgd": lambda c: optax.sgd(c.learning_rate),
    },
    synonyms={"momentum": "sgd", "lazy_adam": "adam", "rowwise_adagrad": "adagrad"},
)

# Number of steps -> the schedule after the warm-up.
SCHEDULES: Mapping[str, Callable[[int], optax.Schedule]] = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, max(steps, 1)),
    # Validations move the factor of the plateau schedule: it is state, see `plateau_schedule`.
    "plateau": lambda steps: optax.constant_schedule(1.0),
}


class StepScalars(NamedTuple):
    """The numbers of a configuration that a step takes as arguments: runs that differ in these
    alone, such as the trials of a sweep, share one compiled program.

    Attributes:
        key: Data of the random key that `config.training.seed` stands for, uint32 [2].
        table_rate: Learning rate of the tables, before the factor of the schedule.
        learning_rate: Learning rate of the dense parameters, likewise.
        weight_decay: Decay of the kernels of dense layers.
    """

    key: jax.Array
    table_rate: jax.Array
    learning_rate: jax.Array
    weight_decay: jax.Array

    @classmethod
    def build(cls, config: TrainingConfig) -> StepScalars:
        """Returns the numbers of a configuration."""
        return cls(
            jax.random.key_data(jax.random.key(config.seed)),
            jnp.float32(config.tables.learning_rate),
            jnp.float32(config.optimizer.learning_rate),
            jnp.float32(config.optimizer.weight_decay),
        )


class Optimizers(NamedTuple):
    """Optimizers of a run.

    Attributes:
        dense: Optax optimizer of the dense parameters, without the schedule.
        config: Configuration of that optimizer.
        tables: Sparse optimizer of the table rows.
        schedule: Step -> factor in [0, 1] on both learning rates, that of the plateau apart.
        plateau: Transformation that keeps the factor of the plateau schedule; None for another
            schedule.
    """

    dense: optax.GradientTransformation
    config: DenseOptimizerConfig
    tables: TableOptimizer
    schedule: optax.Schedule
    plateau: optax.GradientTransformationExtraArgs | None

    @classmethod
    def build(cls, config: TrainingConfig) -> Optimizers:
        """Returns the optimizers that a configuration names.

        Raises:
            ConfigError: An optimizer or the schedule is unknown, or has no such option.
        """
        return cls(
            dense_optimizer(config.optimizer),
            config.optimizer,
            choose(TABLE_OPTIMIZERS, config.tables.kind, "config.training.tables.kind"),
            schedule(config),
            plateau_schedule(config.schedule),
        )

    def init(self, params: Any) -> dict[str, Any]:
        """Returns the fresh `opt_state` of a train state for its dense parameters."""
        state: dict[str, Any] = {"dense": self.dense.init(params)}
        if self.plateau is not None:
            state["plateau"] = self.plateau.init(jnp.float32(0))
        return state

    def dense_with(self, rates: DenseRates) -> optax.GradientTransformation:
        """Returns the dense optimizer with numbers that may be traced in the place of constants.

        Its state is that of `dense`. One of a user's module, which may decide by its numbers, keeps
        those of the configuration.
        """
        if self.config.kind in DENSE.origins:
            return self.dense
        return dense_optimizer(self.config, rates)

    def rate_factor(self, step: jax.Array, opt_state: Mapping[str, Any]) -> Any:
        """Returns the factor on both learning rates at a step."""
        factor = self.schedule(step)
        if "plateau" not in opt_state:
            return factor
        # The warm-up comes before the plateau: both factors are multiplied.
        return factor * opt_state["plateau"].scale

    def after_validation(self, opt_state: dict[str, Any], value: float) -> dict[str, Any]:
        """Returns `opt_state` with the plateau schedule moved on by a validation.

        Args:
            opt_state: State of the optimizers, on any devices.
            value: Validation metric, the greater the better.
        """
        if self.plateau is None:
            return opt_state
        # On the host: arrays over several processes cannot be operands of one process's operation.
        before: ReduceLROnPlateauState = jax.device_get(opt_state["plateau"])
        # Optax watches a loss, the less the better.
        _, after = self.plateau.update({}, before, value=np.float32(-value))
        return opt_state | {"plateau": after}


def dense_optimizer(
    config: DenseOptimizerConfig, rates: DenseRates | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer of a configuration, behind clipping and without the schedule.

    Args:
        config: Kind of the optimizer and its numbers.
        rates: Learning rate and weight decay in the place of those of the configuration.
    """
    make = DENSE.choose(config.kind, "config.training.optimizer.kind")
    optimizer = make(rates or config)
    if not config.clip_norm:
        return optimizer
    # Clipped before the moments are taken. Gradients of tables have no part in the norm.
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _kernels(params: Any) -> Any:
    """Marks the kernels of dense layers: weight decay spares biases, scales and the temperature."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def schedule(config: TrainingConfig) -> optax.Schedule:
    """Returns step -> factor in [0, 1] on every learning rate, that of the plateau apart."""
    kind = config.schedule.kind
    warmup = config.schedule.warmup_steps
    # The cosine ends at the last step, warm-up included.
    after = choose(SCHEDULES, kind, "config.training.schedule.kind")(config.steps - warmup)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])


def plateau_schedule(config: ScheduleConfig) -> optax.GradientTransformationExtraArgs | None:
    """Returns the transformation that lowers the rates when validations stop improving; None for
    another schedule.

    As in PyTorch's `ReduceLROnPlateau`, `patience` validations without improvement are borne, and
    the next one lowers the rates.
    """
    if config.kind != "plateau":
        return None
    return reduce_on_plateau(
        config.factor,
        # Optax lowers the rates at the validation of this number, PyTorch after it.
        patience=config.patience + 1,
        # Any improvement counts. Optax asks for a tolerance above 0; this one is lost in rounding.
        rtol=0.0,
        atol=float(np.finfo(np.float32).tiny),
    )
