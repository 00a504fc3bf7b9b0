"""Checkpoints by Orbax: asynchronous, atomic, the latest few and the best kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from twotower.core.errors import CheckpointError, FolderError
from twotower.core.files import read_json
from twotower.core.mesh import ROW_MULTIPLE

State = TypeVar("State", bound=Any)  # a tree of arrays

_CURE = "Delete that folder to go on from an earlier checkpoint."
# An odd constant near 2^32 / the golden ratio, whose multiples are spread evenly (Knuth).
_GOLDEN = 0x9E3779B1


class OldPlateau(NamedTuple):
    """State of the plateau schedule as runs of every schedule once kept it.

    The order of the fields is that of the checksum.
    """

    scale: Any
    best: Any
    waited: Any


@dataclasses.dataclass(frozen=True)
class _LatestAndBest:
    """Orbax preservation policy: the latest `keep`, and the earliest with the greatest `metric`."""

    folder: epath.Path
    metric: str
    keep: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        metrics = {c.step: c.metrics or read_metrics(self.folder, c.step) for c in checkpoints}
        best = best_step(metrics, self.metric)
        # Orbax passes the checkpoints in the order of their steps.
        first_kept = len(checkpoints) - self.keep
        return [i >= first_kept or c.step == best for i, c in enumerate(checkpoints)]


def best_step(metrics: Mapping[int, Mapping[str, float]], metric: str) -> int | None:
    """Returns the earliest step with the greatest `metric`; None if no step has it."""
    measured = {
        step: values[metric] for step, values in sorted(metrics.items()) if metric in values
    }
    # Steps are sorted, and `max` returns the first of equals: the earliest.
    return max(measured, key=measured.__getitem__, default=None)


def read_metrics(folder: epath.Path, step: int) -> dict[str, float]:
    """Returns the validation metrics of a checkpoint; none of one that has none, or damaged ones.

    Args:
        folder: Folder of the checkpoints.
        step: Step of the checkpoint.
    """
    path = folder / str(step) / "metrics" / "metrics"
    if not path.exists():
        return {}
    # The state has files of its own: it can be restored, and so can all other checkpoints.
    try:
        content = read_json(path)
        return {name: float(value) for name, value in content.items()}
    except (FolderError, OverflowError, TypeError, ValueError):
        absl_logging.warning(
            "%s is damaged: the checkpoint of step %d is not looked at for the best one.",
            path,
            step,
        )
        return {}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps the warnings of Orbax to itself, which tells every reader that it only reads."""
    logger = logging.getLogger("absl")

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in record.pathname

    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


class Checkpoints:
    """The checkpoints of one run; a context that waits for the last save when it ends.

    Args:
        folder: Folder of the checkpoints.
        metric: Validation metric of the best one.
        keep: Number of the latest ones to keep.
        run: Name of the run; a checkpoint of another run is refused.
        read_only: Whether to leave the folder as it is, whatever is being saved in it.
    """

    def __init__(
        self, folder: epath.PathLike, *, metric: str, keep: int, run: str, read_only: bool = False
    ) -> None:
        self.folder = epath.Path(folder)
        self._metric = metric
        self._run = run
        quiet = _without_warnings() if read_only else contextlib.nullcontext()
        with quiet:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(self.folder, metric, keep),
                # Orbax stores the metrics only where it has a `best_fn`.
                best_fn=lambda values: values.get(metric, 0.0),
                # Only the trainer may clean up: to a reader a half-written folder is the trainer's
                # save in progress.
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
                # Else Orbax reads the metrics of all checkpoints, and one damaged file of theirs
                # would keep the whole run from being opened.
                lightweight_initialize=True,
            )
            # Resolved, since Orbax refuses relative paths.
            self._manager = ocp.CheckpointManager(
                self.folder.resolve(), options=options, item_names=("state", "record")
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
        """Starts to save; training may go on at once, also with the state donated.

        Args:
            step: Number of steps done.
            state: Tree of arrays.
            record: Progress of the loop, as JSON.
            metrics: Validation metrics.
        """
        if jax.process_index() == 0:
            self._check_writable()
        # The checksum waits for the step that made the state; the copy of the state is then
        # asynchronous.
        checked = {
            "run": self._run,
            "checksum": checksum(state),
            "devices": _count_devices(state),
            "loop": dict(record),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(checked)
        )
        # By force: asked whether a save is due, Orbax would ask JAX whether the run is preempted,
        # with another count than the loop's.
        self._manager.save(step, args=items, metrics=dict(metrics), force=True)

    def _check_writable(self) -> None:
        """Makes and deletes a folder.

        Where Orbax cannot make its own, its threads and the other processes wait for that for
        twenty minutes.
        """
        probe = self.folder / f".writable-{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()

    def latest(self) -> int | None:
        """Returns the step of the latest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step with the best validation metric; the latest if none was measured."""
        steps = self._manager.all_steps()
        metrics = {step: self.metrics(step) for step in steps}
        best = best_step(metrics, self._metric)
        if best is None:
            return self.latest()
        return best

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the validation metrics of a step; {} if none were measured."""
        return read_metrics(self.folder, step)

    def wait(self) -> None:
        """Waits for the save in progress."""
        self._manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """Returns the record of a step alone.

        Raises:
            CheckpointError: There is no checkpoint of that step.
        """
        self._check_exists(step)
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        restored: Any = self._manager.restore(step, args=items)
        return restored["record"]["loop"]

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """Returns the state and the record of a step.

        Args:
            step: Number of steps done.
            abstract: Shapes, types and shardings to restore onto.

        Raises:
            CheckpointError: There is no checkpoint of that step, its files are corrupt, or it holds
                the arrays of another model or run.
        """
        self._check_exists(step)
        folder = self.folder / str(step)
        try:
            restored = self._read(step, abstract)
        except Exception as error:
            # Orbax and TensorStore raise errors of many kinds for a damaged file.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(
                f"{folder} cannot be restored: it is damaged, or was written by a model with other "
                f"tables or layers than this configuration's. {_CURE} ({reason})"
            ) from error
        state = restored["state"]
        record = restored["record"]
        # Its arrays may have the same shapes by chance: only the name tells.
        if record["run"] != self._run:
            raise CheckpointError(
                f"{folder} belongs to another run, of another configuration. {_CURE}"
            )
        if record["checksum"] != checksum(state):
            raise CheckpointError(
                f"{folder} cannot be restored: its arrays are not those saved. {_CURE}"
            )
        if "plateau" not in abstract.opt_state:
            state = _without_old_scalars(state)
        return state, record["loop"]

    def _read(self, step: int, abstract: Any) -> Any:
        """Reads the items of a step, also those of the time when every run kept a plateau's
        state, and those of a number of devices for which tables have other rows of padding."""

        # Rows may be left out or appended at the end of tables then, where all are zero: the
        # checksum is that of the rows without them.
        strict = not self._differs_in_padding(step, abstract)

        def read(target: Any) -> Any:
            # Explicit shardings let a run go on with another number of devices.
            state = ocp.args.StandardRestore(target, strict=strict)
            items = ocp.args.Composite(state=state, record=ocp.args.JsonRestore())
            return self._manager.restore(step, args=items)

        try:
            return read(abstract)
        except Exception as error:
            if "plateau" in abstract.opt_state:
                raise
            try:
                return read(_with_old_scalars(abstract))
            except Exception:
                # Damaged, or of another model: the first error says it of the tree as it is now.
                raise error from None

    def _differs_in_padding(self, step: int, abstract: Any) -> bool:
        """Returns whether a checkpoint has other rows of padding than a state, and nothing else."""
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        restored: Any = self._manager.restore(step, args=items)
        before = restored["record"].get("devices", 1)
        now = _count_devices(abstract)
        # The usual case, for which nothing more is read.
        if math.lcm(ROW_MULTIPLE, before) == math.lcm(ROW_MULTIPLE, now):
            return False
        # Not by the manager, which knows an item only once it has restored it.
        folder = self.folder.resolve() / str(step) / "state"
        saved = ocp.StandardCheckpointHandler().metadata(folder)
        shapes = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(saved):
            shapes[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf.shape
        differ = False
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
            shape = shapes.pop(jax.tree_util.keystr(path, simple=True, separator="/"), None)
            if shape == leaf.shape:
                continue
            if not shape or shape[1:] != leaf.shape[1:]:
                return False
            if not _pads_alike(shape[0], before, leaf.shape[0], now):
                return False
            differ = True
        return differ and not shapes

    def _check_exists(self, step: int) -> None:
        steps = self._manager.all_steps()
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self.folder} has no checkpoint of step {step}; it has: {known}."
            )


def _count_devices(state: Any) -> int:
    """Returns the number of devices that the arrays of a state, or their shapes, lie on."""
    counts = [1]
    for leaf in jax.tree.leaves(state):
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None:
            counts.append(sharding.num_devices)
    return max(counts)


def _pads_alike(before: int, devices_before: int, now: int, devices: int) -> bool:
    """Returns whether a table that had `before` rows on some devices has `now` on others."""
    multiple_before = math.lcm(ROW_MULTIPLE, devices_before)
    multiple = math.lcm(ROW_MULTIPLE, devices)
    if before % multiple_before or now % multiple:
        return False
    # The used rows are not known here: some number of them must lead to both.
    return max(before - multiple_before, now - multiple) < min(before, now)


def _with_old_scalars(abstract: State) -> State:
    """Adds the scalars that every checkpoint once held to what is restored."""
    # A scalar lies on the devices as the step does, whole on each.
    scalar = functools.partial(jax.ShapeDtypeStruct, (), sharding=abstract.step.sharding)
    plateau = OldPlateau(scalar(jnp.float32), scalar(jnp.float32), scalar(jnp.int32))
    return abstract.replace(opt_state=abstract.opt_state | {"plateau": plateau})


def _without_old_scalars(state: State) -> State:
    opt_state = {name: part for name, part in state.opt_state.items() if name != "plateau"}
    return state.replace(opt_state=opt_state)


def checksum(state: Any) -> int:
    """Returns a number, below 2^32, that any change of a single element of any array changes.

    Orbax's files have no checksum of their own: a flipped byte restores without a word.
    """
    leaves = jax.tree.leaves(state)
    if any(_is_elsewhere(leaf) for leaf in leaves):
        return int(device_checksum(state))
    total = 0
    for number, leaf in enumerate(leaves):
        total += (2 * number + 1) * _host_checksum(np.asarray(leaf))
    return total % 2**32


def _is_elsewhere(leaf: jax.Array | np.ndarray) -> bool:
    """Returns whether an array is on an accelerator, or divided over devices."""
    if isinstance(leaf, np.ndarray):
        return False
    devices = leaf.devices()
    return len(devices) > 1 or next(iter(devices)).platform != "cpu"


def _host_checksum(array: np.ndarray, *, block: int = 2**18) -> int:
    """Returns the sum over elements i of bits x (2 i golden + 1), modulo 2^32."""
    # NumPy compiles nothing, and is as fast as XLA while a block stays in the cache.
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    factors = 2 * np.arange(min(block, len(words)), dtype=np.uint32) * np.uint32(_GOLDEN) + 1
    total = 0
    for start in range(0, len(words), block):
        part = words[start : start + block]
        shift = np.uint32(2 * start * _GOLDEN % 2**32)
        total += int(np.sum(part * (factors[: len(part)] + shift), dtype=np.uint32))
    return total % 2**32


@jax.jit
def device_checksum(state: Any) -> jax.Array:
    """Returns the number of `checksum`, uint32, computed where the arrays are."""
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        # Bits, not values: a NaN and the sign of 0 count too. All arrays of a state have 32 bits.
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        # Odd factors are invertible modulo 2^32, so no change of one element cancels out.
        factors = 2 * jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(_GOLDEN) + 1
        # Integer sums wrap around and have no order: every division over devices gives the same.
        part = jnp.sum(words * factors, dtype=jnp.uint32)
        total += jnp.uint32(2 * number + 1) * part
    return total
