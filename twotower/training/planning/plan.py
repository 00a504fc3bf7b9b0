"""The plan of a training that nobody has started: memory, time and price, from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from twotower.config import Config
from twotower.core.errors import choose
from twotower.core.mesh import (
    AXIS,
    REPLICATED,
    ROW_MULTIPLE,
    SHARDED,
    device_group,
    shard_map_if_needed,
)
from twotower.kernels.streaming_softmax import block_rows
from twotower.objectives.alias import AliasTable
from twotower.objectives.negatives import MAX_EXPLICIT_ITEMS
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import CorpusSize
from twotower.training.checks import bytes_on_each, check_batch, format_bytes
from twotower.training.init import abstract_state
from twotower.training.planning.costs import Cost, Target, read_cost
from twotower.training.planning.peaks import CHIPS, SUSTAINED, Chip
from twotower.training.planning.shapes import ASSUMED_VALUES, Shapes
from twotower.training.state import Trainer, state_specs
from twotower.training.step import train_step

# Share of the memory of which a part is named as one that could be smaller.
_LARGE = 0.1
# Seconds of a step below which the start of each of its programs tells: on an H200 steps planned
# for .3 and 2 ms took 1.5 times as long (experiments/benchmarks/RESULTS.md).
_SHORT = 3e-3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training would take.

    Attributes:
        config: Configuration of the run, with what "auto" stands for.
        shapes: Shapes of the run.
        devices: Number of devices.
        kind: Kind of their chips, a key of `CHIPS`.
        memory: Name -> bytes on each device; see `memory_parts`.
        cost: What each device does in a step.
        times: "compute", "memory" and "network" -> seconds of a step that each would take alone.
        dim: D, the width of the vectors.
    """

    config: Config
    shapes: Shapes
    devices: int
    kind: str
    memory: Mapping[str, float]
    cost: Cost
    times: Mapping[str, float]
    dim: int

    @property
    def chip(self) -> Chip:
        """The accelerator."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips that have the devices."""
        # Rounded up: a chip is rented whole.
        return -(-self.devices // self.chip.devices)

    @property
    def total(self) -> float:
        """Bytes that a device needs."""
        return sum(self.memory.values())

    @property
    def limit(self) -> float:
        """Bytes that JAX allocates from on a device."""
        # JAX takes this share when it starts, and allocates from nothing else.
        return self.chip.memory / self.chip.devices * self.chip.usable

    @property
    def fits(self) -> bool:
        """Whether a device has what it needs."""
        return self.total <= self.limit

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: the devices exchange what the next operations wait for, while
        arithmetic and memory work at once."""
        return max(self.times["compute"], self.times["memory"]) + self.times["network"]

    @property
    def bound(self) -> str:
        """What a step waits for most: "compute", "memory" or "network"."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def steps(self) -> int:
        """Number of steps of an epoch."""
        # The last batch is filled up with the first rows of the next epoch.
        return math.ceil(self.shapes.examples / self.config.training.batch_size)

    @property
    def epoch_seconds(self) -> float:
        """Seconds of an epoch, without validations and checkpoints."""
        return self.steps * self.step_seconds

    def epoch_price(self, price: float) -> float:
        """Returns the price of an epoch.

        Args:
            price: Price of a chip for an hour.
        """
        return price * self.chips * self.epoch_seconds / 3600


def make_plan(config: Config, shapes: Shapes, *, devices: int, kind: str) -> Plan:
    """Returns the plan of a training.

    Args:
        config: Configuration of the run.
        shapes: Shapes of the run; see `twotower.training.planning.shapes`.
        devices: Number of devices, as JAX counts them.
        kind: Kind of their chips, a key of `CHIPS`.

    Raises:
        ConfigError: The kind is unknown, or the batch cannot be divided.
    """
    chip = choose(CHIPS, kind, "--kind")
    trainer = planned_trainer(config, shapes, backend="accelerator")
    # With "auto" replaced, so that the plan says what it counted with.
    config = trainer.config
    check_batch(config.training, _mesh(devices))
    cost = step_cost(trainer, shapes, devices)
    memory = memory_parts(trainer, shapes, devices, cost)
    # A step runs on devices; the tables of makers tell of chips.
    flops = chip.flops / chip.devices
    if config.model.dtype == "float32":
        flops *= chip.float32
    times = {
        "compute": cost.flops / (flops * SUSTAINED),
        "memory": cost.moved / (chip.bandwidth / chip.devices * SUSTAINED),
        "network": cost.sent / (chip.ring(devices) * SUSTAINED),
    }
    return Plan(config, shapes, devices, kind, memory, cost, times, trainer.model.dim)


def planned_trainer(config: Config, shapes: Shapes, *, backend: str) -> Trainer:
    """Returns the trainer of a plan, with what a backend decides decided.

    Args:
        config: Configuration of the run.
        shapes: Shapes of the run.
        backend: "cpu", or any other word for an accelerator.
    """
    model = config.model
    # What "auto" becomes on an accelerator; asking JAX would tell of this machine.
    if model.dtype == "auto":
        model = dataclasses.replace(model, dtype="bfloat16")
        config = dataclasses.replace(config, model=model)
    # From shapes: an encoder would need the data.
    towers = TwoTower.build_from(model, shapes.inputs, shapes.tables)
    corpus = CorpusSize(shapes.users, shapes.items, shapes.unseen)
    trainer = Trainer.build(config, towers, corpus)
    # Blocks are chosen by the backend, which is not that of this machine; what Pallas's kernels
    # take has not been measured.
    candidates = trainer.sampling.candidates - trainer.sampling.hard
    rows = config.objective.block or block_rows(candidates, backend)
    objective = dataclasses.replace(config.objective, block=rows, softmax_kernel="blocks")
    return dataclasses.replace(trainer, config=dataclasses.replace(config, objective=objective))


def step_cost(trainer: Trainer, shapes: Shapes, devices: int, *, platform: str = "") -> Cost:
    """Returns what a device does and holds in a step, traced and never compiled.

    Args:
        trainer: Model, loss and optimizers.
        shapes: Shapes of the run.
        devices: Number of devices.
        platform: "cpu", or empty for an accelerator.
    """
    mesh = _mesh(devices)
    sharded = abstract_state(trainer, mesh)
    specs = state_specs(sharded)
    # Without shardings: the specs of the shard_map say how each array is divided.
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sharded)
    step = functools.partial(train_step, trainer=trainer, group=device_group(mesh))
    mapped = shard_map_if_needed(mesh, step, (specs, SHARDED, REPLICATED), (specs, REPLICATED))
    traced = jax.make_jaxpr(mapped)(state, dict(shapes.batch), step_arrays(trainer, shapes))
    # The state is donated: results are written over it.
    donated = len(jax.tree.leaves(state))
    return read_cost(traced, Target(devices, platform), donated=donated)


def _mesh(devices: int) -> AbstractMesh:
    """Returns a mesh of devices that need not exist."""
    return AbstractMesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))


def step_arrays(trainer: Trainer, shapes: Shapes) -> dict[str, Any]:
    """Returns the shapes of `twotower.training.candidates.step_constants`."""
    sampling = trainer.sampling
    arrays: dict[str, Any] = {}
    if sampling.needs_features:
        arrays["item_features"] = dict(shapes.item_features)
    if sampling.config.popularity:
        # The fields of the table have one type each.
        table: Any = AliasTable
        types = ("uint32", "int32", "float32")
        fields = [jax.ShapeDtypeStruct((shapes.items,), dtype) for dtype in types]
        arrays["popularity"] = table(*fields)
    if sampling.config.explicit:
        pools = (shapes.users, MAX_EXPLICIT_ITEMS)
        arrays["explicit"] = {
            "items": jax.ShapeDtypeStruct(pools, "int32"),
            "sizes": jax.ShapeDtypeStruct(pools[:1], "int32"),
        }
    return arrays


def memory_parts(trainer: Trainer, shapes: Shapes, devices: int, cost: Cost) -> dict[str, float]:
    """Returns the bytes on each device, by what they are for.

    Args:
        trainer: Model, loss and optimizers.
        shapes: Shapes of the run.
        devices: Number of devices.
        cost: Result of `step_cost`.
    """
    mesh = _mesh(devices)
    state = abstract_state(trainer, mesh)
    arrays = step_arrays(trainer, shapes)
    data = 0.0
    # The same rule as the loop's, which keeps data on the devices where it is small.
    if shapes.data <= trainer.config.training.resident_limit * 2**20:
        data = float(shapes.data)
        # The data on the device has them already.
        arrays.pop("item_features", None)
    return {
        "tables": bytes_on_each(state.tables),
        "slots of the table optimizer": bytes_on_each(state.table_slots),
        "dense parameters and their optimizer": bytes_on_each(
            (state.step, state.params, state.opt_state, state.batch_stats)
        ),
        "frequencies": bytes_on_each(state.frequency),
        "queue and mined pools": bytes_on_each(state.negatives),
        "data": data,
        "arrays of the corpus": whole_bytes(arrays),
        # Rows of a batch are divided between devices; the constants above are whole on each.
        "batch": whole_bytes(shapes.batch) / devices,
        # Apart from the blocks, since another option makes those smaller.
        "activations and gradients": cost.peak - cost.blocks,
        "blocks of the loss": cost.blocks,
    }


def whole_bytes(tree: Any) -> float:
    """Returns the bytes of all arrays of a tree of shapes."""
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def find_cures(plan: Plan) -> list[str]:
    """Returns what makes a run smaller, the most at the top; for one that does not fit."""
    memory = plan.memory
    training = plan.config.training
    large = _LARGE * plan.limit
    divided = memory["tables"] + memory["slots of the table optimizer"]
    others = plan.total - divided
    cures: list[tuple[float, str]] = []

    def add(saved: float, cure: str) -> None:
        # What saves little is no cure, and hides those that are.
        if saved > large:
            cures.append((saved, f"{cure}: {format_bytes(saved)} less on each device"))

    devices = _devices_that_hold(plan, divided, others)
    if devices:
        add(divided * (1 - plan.devices / devices), f"--devices={devices}")
    if training.tables.kind != "rowwise_adagrad":
        # One number a row, of rows that are taken to be 64 wide.
        rowwise = memory["tables"] / 64
        saved = memory["slots of the table optimizer"] - rowwise
        add(saved, "config.training.tables.kind='rowwise_adagrad'")
    add(divided / 2, "embeddings of half the width (embedding_size)")
    add(divided / 2, "half of the rows of tables (min_count of the id features)")
    moving = memory["activations and gradients"] + memory["batch"]
    add(moving / 2, f"config.training.batch_size={training.batch_size // 2}")
    block = plan.config.objective.block
    add(memory["blocks of the loss"] / 2, f"config.objective.block={block // 2}")
    add(memory["data"], "config.training.input='host', which leaves the data in its files")
    add(memory["frequencies"], "config.objective.negatives.frequency='sketch'")
    add(
        memory["arrays of the corpus"] + memory["queue and mined pools"],
        "no sampled, mined or explicit negatives (in_batch alone)",
    )
    cures.sort(key=lambda cure: -cure[0])
    found = [text for _, text in cures]
    roomy = [
        kind
        for kind, chip in CHIPS.items()
        if plan.total <= chip.memory / chip.devices * chip.usable
    ]
    if roomy:
        found.append(f"--kind={' or '.join(roomy)}, which has room for it")
    # TPUs allocate nearly all of their memory as it is.
    if plan.chip.usable < 0.9 and plan.total <= 0.9 * plan.chip.memory / plan.chip.devices:
        found.append("XLA_PYTHON_CLIENT_MEM_FRACTION=.9 in the environment, in place of JAX's .75")
    return found


def _devices_that_hold(plan: Plan, divided: float, others: float) -> int:
    """Returns the least number of devices that holds a plan; 0 if none does."""
    devices = plan.devices
    # More devices divide the tables alone: batch, data and dense layers stay as large on each.
    while devices < ROW_MULTIPLE:
        devices *= 2
        if others + divided * plan.devices / devices <= plan.limit:
            return devices
    return 0


def format_plan(plan: Plan, *, price: float = 0.0) -> str:
    """Returns a plan as text.

    Args:
        plan: The plan.
        price: Price of a chip for an hour; 0 if it is not known.
    """
    lines = [
        *_size_lines(plan),
        "",
        *_memory_lines(plan),
        "",
        *_step_lines(plan),
        "",
        *_epoch_lines(plan, price),
        *_notes(plan),
    ]
    # Last: a terminal shows the end.
    if not plan.fits:
        lines += ["", "What makes it fit, or smaller:"]
        lines += [f"  {cure}" for cure in find_cures(plan)]
    return "\n".join(lines)


def _size_lines(plan: Plan) -> list[str]:
    shapes = plan.shapes
    chip = plan.chip
    per_chip = "" if chip.devices == 1 else f" ({plan.chips} chips)"
    noun = "device" if plan.devices == 1 else "devices"
    return [
        f"{shapes.users:,} users, {shapes.items:,} items, {shapes.rows:,} training rows, batches "
        f"of {plan.config.training.batch_size:,}, products in {plan.config.model.dtype}.",
        f"{plan.devices} {noun}{per_chip} of {plan.kind}: {chip.flops / 1e12:,.0f} TFLOP/s, "
        f"{format_bytes(chip.memory)} and {chip.bandwidth / 1e9:,.0f} GB/s a chip "
        f"({chip.source}).",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    chip = plan.chip
    lines = ["Memory of each device"]
    for name, count in plan.memory.items():
        # Parts that this configuration has not would only make a reader look for them.
        if count:
            lines.append(f"  {name:38}{format_bytes(count):>12}")
    lines.append(f"  {'in all':38}{format_bytes(plan.total):>12}")
    state = "fits" if plan.fits else "DOES NOT FIT"
    share = f"{chip.usable:.0%} of {format_bytes(chip.memory / chip.devices)}"
    lines.append(
        f"  {'that JAX allocates from':38}{format_bytes(plan.limit):>12}  {share}: {state}"
    )
    return lines


def _step_lines(plan: Plan) -> list[str]:
    return [
        f"Step, at {SUSTAINED:.0%} of each peak",
        _time_line(plan, "compute", f"{plan.cost.flops / 1e9:,.3f} GFLOP"),
        _time_line(plan, "memory", f"{format_bytes(plan.cost.moved)} read and written"),
        _time_line(plan, "network", f"{format_bytes(plan.cost.sent)} sent by each device"),
        f"  {'predicted':10}{_milliseconds(plan.step_seconds)}  bound by {plan.bound}",
    ]


def _epoch_lines(plan: Plan, price: float) -> list[str]:
    rate = plan.shapes.examples / max(plan.epoch_seconds, 1e-9)
    lines = [
        f"Epoch: {plan.steps:,} steps, {_duration(plan.epoch_seconds)}, "
        f"{rate:,.0f} examples a second."
    ]
    # Prices change by region and contract: none is built in.
    if price:
        paid = plan.epoch_price(price)
        lines.append(f"Price: {paid:,.2f} an epoch, at {price:g} a chip and hour.")
    return lines


def _notes(plan: Plan) -> list[str]:
    """Returns what was assumed, and what the figures leave out."""
    shapes = plan.shapes
    notes = []
    if shapes.assumed:
        columns = ", ".join(shapes.assumed)
        notes.append(
            f"Assumed: {ASSUMED_VALUES:,} values each of {columns} "
            "(--values=COLUMN=NUMBER,... says)."
        )
    if not plan.memory["data"]:
        # All hosts together, since the reader divides by the number that the cluster has.
        batch = format_bytes(whole_bytes(shapes.batch))
        notes.append(
            f"The data, {format_bytes(shapes.data)}, is streamed: {batch} a step over all hosts. "
            "A host that is slower than the step bounds it, which is not counted."
        )
    if plan.step_seconds < _SHORT:
        notes.append("A step so short takes longer: that programs are started is not counted.")
    vectors = format_bytes(4.0 * shapes.items * plan.dim)
    notes.append(
        f"Not counted: validation and export, which make the vectors of all items ({vectors}), and "
        "checkpoints, which pass through the memory of the hosts."
    )
    return notes


def _time_line(plan: Plan, name: str, amount: str) -> str:
    return f"  {name:10}{_milliseconds(plan.times[name])}  {amount}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:12,.3f} ms"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:,.1f} seconds"
    if seconds < 3600:
        return f"{seconds / 60:,.1f} minutes"
    return f"{seconds / 3600:,.1f} hours"
