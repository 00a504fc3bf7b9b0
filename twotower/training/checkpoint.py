"""Checkpoints by Orbax: asynchronous, atomic, the latest few and the best kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from twotower.core.errors import CheckpointError

State = TypeVar("State")  # a tree of arrays


@dataclasses.dataclass(frozen=True)
class _LatestAndBest:
    """Orbax preservation policy: the latest `keep`, and the earliest with the greatest `metric`."""

    metric: str
    keep: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = best_step({c.step: c.metrics or {} for c in checkpoints}, self.metric)
        recent = len(checkpoints) - self.keep
        return [i >= recent or c.step == best for i, c in enumerate(checkpoints)]


def best_step(metrics: Mapping[int, Mapping[str, float]], metric: str) -> int | None:
    """The earliest step with the greatest `metric`; None where no step has it."""
    measured = {
        step: values[metric] for step, values in sorted(metrics.items()) if metric in values
    }
    return max(measured, key=measured.__getitem__) if measured else None


class Checkpoints:
    """The checkpoints of one run; a context that waits for the last save when it ends.

    Args:
        folder: where they are.
        metric: the validation metric of the best.
        keep: how many of the latest to keep.
        run: names the run; a checkpoint of another one is refused.
        read_only: leave the folder as it is, whatever is being saved in it.
    """

    def __init__(
        self, folder: epath.PathLike, *, metric: str, keep: int, run: str, read_only: bool = False
    ) -> None:
        self.folder, self._metric, self._run = epath.Path(folder), metric, run
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(metric, keep),
            best_fn=lambda values: values.get(metric, 0.0),
            # Orbax stores the metrics only where it has a `best_fn`.
            # Only the trainer may clean up: to a reader a half-written folder is the trainer's save
            # in progress.
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        names = ("state", "record")
        self._manager = ocp.CheckpointManager(
            self.folder.resolve(), options=options, item_names=names
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(
        self,
        step: int,
        state: Any,
        *,
        record: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        """Starts to save; training may go on at once, also with `state` donated."""
        checked = {"run": self._run, "checksum": int(checksum(state)), "loop": dict(record)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(checked)
        )
        self._manager.save(step, args=items, metrics=dict(metrics))

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the best validation metric; the latest where nothing was measured."""
        steps = self._manager.all_steps()
        found = best_step({s: self._manager.metrics(s) or {} for s in steps}, self._metric)
        return self.latest() if found is None else found

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """The record of `step` alone; raises as `restore`."""
        self._check(step)
        return self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        ).record["loop"]

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """The state and the record of `step`.

        Args:
            abstract: shapes, types and shardings to restore onto, always explicit.

        Raises:
            CheckpointError: the files are corrupt, or hold the arrays of another model or run.
        """
        self._check(step)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise many kinds for a damaged file; the cause is kept.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(
                f"{self.folder / str(step)} cannot be restored: it is damaged, or was written by a model with other "
                f"tables or layers than this configuration's. {_REMEDY} ({reason})"
            ) from error
        if restored.record["run"] != self._run:
            raise CheckpointError(
                f"{self.folder / str(step)} belongs to another run, of another configuration. {_REMEDY}"
            )
        if restored.record["checksum"] != int(checksum(restored.state)):
            raise CheckpointError(
                f"{self.folder / str(step)} cannot be restored: its arrays are not those saved. {_REMEDY}"
            )
        return restored.state, restored.record["loop"]

    def _check(self, step: int) -> None:
        if step not in self._manager.all_steps():
            known = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise CheckpointError(
                f"{self.folder} has no checkpoint of step {step}; it has: {known}."
            )


_REMEDY = "Delete that folder to go on from an earlier checkpoint."


@jax.jit
def checksum(state: Any) -> jax.Array:
    """A number, uint32, that any change of a single element of any array changes; computed where
    the arrays are.

    Orbax's files have no checksum of their own: a flipped byte restores without a word.
    """
    total = jnp.uint32(0)
    for place, leaf in enumerate(jax.tree.leaves(state)):
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        # Odd factors are invertible modulo 2^32, so no change of one element cancels out.
        factors = 2 * jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B1) + 1
        total += jnp.uint32(2 * place + 1) * jnp.sum(words * factors, dtype=jnp.uint32)
    return total
