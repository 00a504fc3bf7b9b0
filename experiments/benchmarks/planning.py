"""The memory that `twotower plan` predicts beside that of real steps.

    python -m experiments.benchmarks.planning [--quick] [--json=FILE]

Each setting runs in a process of its own: the state is made as `fit` makes it, and three steps are
run as `fit` runs them, of drawn batches. The bytes of the state are those of its arrays, and must
be those of the plan. The peak is the greatest resident memory of the process less that before the
state was made, when everything was imported and compiled; all devices share the process. The third
figure is XLA's own: the temporary arrays of the compiled step.

The second table has the streaming loss on an H200, planned here, beside what RESULTS.md says was
measured there: float32 and bfloat16, milliseconds and megabytes of temporaries.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import PartitionSpec

from experiments.benchmarks import harness
from twotower.config import Config, from_dict
from twotower.core.mesh import AXIS, REPLICATED, make_mesh, put, put_parts
from twotower.kernels.loss_inputs import Candidates, LossInputs, LossOptions, Positives
from twotower.kernels.streaming_softmax import block_rows, streaming_softmax
from twotower.objectives.losses import LOSSES
from twotower.training.init import abstract_state, init_on
from twotower.training.loop import jit_steps
from twotower.training.planning import plan
from twotower.training.planning.costs import Target, read_cost
from twotower.training.planning.peaks import CHIPS, SUSTAINED
from twotower.training.planning.shapes import Shapes, planned_shapes
from twotower.training.state import Trainer

_SETTING = flags.DEFINE_integer("setting", -1, "Measure this one alone, here.")
_MIB = 2**20
# Buffers go back to the system when they are freed, so that resident memory is what is held.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
_STATE = (
    "tables",
    "slots of the table optimizer",
    "dense parameters and their optimizer",
    "frequencies",
    "queue and mined pools",
)


# Queries and candidates, whether in bfloat16 -> ms and MB measured on an H200 (RESULTS.md).
_ON_H200 = {
    (1_024, False): (0.058, 6),
    (4_096, False): (0.176, 76),
    (16_384, False): (2.20, 288),
    (65_536, False): (36.0, 312),
    (4_096, True): (0.129, 101),
    (16_384, True): (1.71, 414),
}


class Setting(NamedTuple):
    """A training.

    Attributes:
        batch: Rows of a batch.
        width: Width D of tables and vectors.
        hidden: Width of the hidden layer of each tower.
        optimizer: Kind of the optimizer of tables.
        devices: Number of devices.
        users: Number of users; items are a tenth.
        loss: Kind of loss.
    """

    batch: int
    width: int
    hidden: int
    optimizer: str = "rowwise_adagrad"
    devices: int = 1
    users: int = 1_000_000
    loss: str = "softmax"


_SETTINGS = (
    Setting(batch=4_096, width=64, hidden=128),
    Setting(batch=16_384, width=64, hidden=512, users=100_000),
    Setting(batch=8_192, width=32, hidden=64, optimizer="lazy_adam"),
    Setting(batch=8_192, width=64, hidden=128, devices=4),
    Setting(batch=8_192, width=64, hidden=256, users=50_000, loss="hinge"),
)


def main(argv: list[str]) -> None:
    del argv
    if _SETTING.value >= 0:
        print(json.dumps(measure(_SETTINGS[_SETTING.value])))
        return
    rows = []
    titles = ("batch", "D", "hidden", "optimizer", "devices", "users", "loss")
    figures = ("state", "planned", "measured", "ratio", "temporary, planned", "XLA's")
    print("| " + " | ".join((*titles, *figures)) + " |")
    print("|" + "---|" * (len(titles) + len(figures)))
    for number, setting in enumerate(_SETTINGS[:2] if harness.QUICK.value else _SETTINGS):
        command = [sys.executable, "-m", "experiments.benchmarks.planning", f"--setting={number}"]
        environment = os.environ | _ALLOCATOR
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append({"setting": setting._asdict(), **row})
        measured = [row["state"], row["planned"], row["peak"], row["peak"] / row["planned"]]
        measured += [row["temporary"], row["xla"]]
        cells = [*map(str, setting), *(f"{value:,.2f}" for value in measured)]
        print("| " + " | ".join(cells) + " |", flush=True)
    print("\n| B | type | ms planned | ms measured | MB planned | MB measured |")
    print("|---|---|---|---|---|---|")
    for (size, is_narrow), (seconds, megabytes) in _ON_H200.items():
        time, memory = plan_loss(size, is_narrow=is_narrow)
        kind = "bfloat16" if is_narrow else "float32"
        print(f"| {size:,} | {kind} | {time:.3f} | {seconds} | {memory:.0f} | {megabytes} |")
    if harness.JSON.value:
        text = json.dumps({"benchmark": "planning", "results": rows}, indent=2)
        Path(harness.JSON.value).write_text(text)


def measure(setting: Setting) -> dict[str, float]:
    """Returns the memory of a training in MiB, planned and measured, of all its devices."""
    jax.config.update("jax_num_cpu_devices", setting.devices)
    config = make_config(setting)
    shapes = planned_shapes(
        config, users=setting.users, items=setting.users // 10, rows=10**9, values={}
    )
    trainer = plan.planned_trainer(config, shapes, backend="cpu")
    cost = plan.step_cost(trainer, shapes, setting.devices, platform="cpu")
    parts = plan.memory_parts(trainer, shapes, setting.devices, cost)
    mesh = make_mesh()
    abstract = abstract_state(trainer, mesh)
    batch = draw_batch(trainer, shapes)
    jitted: Any = jit_steps(trainer, mesh, None, 1)
    steps = jitted.lower(abstract, batch, None, {}, np.int32(1)).compile()
    temporary = steps.memory_analysis().temp_size_in_bytes
    counts = {
        "user": np.ones(shapes.users, np.float32),
        "item": np.ones(shapes.items, np.float32),
        "rows": np.float32(shapes.rows),
    }
    # Compiled, and the allocator's own memory taken, before anything is measured.
    state: Any = init_on(mesh, trainer, counts)
    number = put(mesh, np.int32(1), REPLICATED)
    batch = put_parts(mesh, batch, PartitionSpec(None, AXIS), axis=1)
    state, metrics = steps(state, batch, None, {}, number)
    jax.block_until_ready(metrics)
    del state, metrics
    gc.collect()
    before = resident("VmRSS")
    state = init_on(mesh, trainer, counts)
    jax.block_until_ready(state)
    # What making it took is not what a step takes.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        state, metrics = steps(state, batch, None, {}, number)
        jax.block_until_ready(metrics)
    peak = resident("VmHWM") - before
    held = sum(shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards)
    devices = setting.devices
    planned = devices * sum(parts[name] for name in _STATE)
    assert held == planned, f"the state has {held:,} bytes, and {planned:,} were planned"
    return {
        "state": held / _MIB,
        "planned": devices * sum(parts.values()) / _MIB,
        "peak": peak / _MIB,
        "temporary": cost.peak / _MIB,
        "xla": temporary / _MIB,
    }


def plan_loss(size: int, *, is_narrow: bool, width: int = 64) -> tuple[float, float]:
    """Returns the milliseconds that the loss and its gradients take on an H200 by the plan's
    formulas, and the megabytes of its temporaries."""
    dtype = jnp.bfloat16 if is_narrow else None

    def compare(queries: Any, items: Any, ids: Any, users: Any, weights: Any, counts: Any) -> Any:
        positives = Positives(items, ids, counts)
        candidates = Candidates(items, ids, users, counts)
        inputs = LossInputs(queries, users, weights, positives, candidates, scale=10.0)
        rows = block_rows(size, "gpu")
        return streaming_softmax(inputs, LossOptions(LOSSES["softmax"]), block=rows, dtype=dtype)

    vectors = jax.ShapeDtypeStruct((size, width), "float32")
    ids = jax.ShapeDtypeStruct((size,), "int32")
    numbers = jax.ShapeDtypeStruct((size,), "float32")
    differentiated = jax.value_and_grad(compare, (0, 1))
    arguments = (vectors, vectors, ids, ids, numbers, numbers)
    cost = read_cost(jax.make_jaxpr(differentiated)(*arguments), Target())
    chip = CHIPS["h200"]
    flops = chip.flops if is_narrow else chip.flops * chip.float32
    seconds = max(cost.flops / flops, cost.moved / chip.bandwidth) / SUSTAINED
    # Results are no temporaries.
    return 1e3 * seconds, (cost.peak - 2 * size * width * 4) / 1e6


def make_config(setting: Setting) -> Config:
    """Returns the configuration of a training whose data is streamed."""
    towers = {"layers": (setting.hidden, setting.width)}
    tables = {}
    for side in ("user", "item"):
        tables[side] = {f"{side}_id": {"type": "string", "embedding_size": setting.width}}
    return from_dict(
        {
            "features": tables,
            "model": {"user": towers, "item": towers},
            "objective": {
                "loss": setting.loss,
                "negatives": {"uniform": 0},
                "margin": _margin(setting),
            },
            "training": {
                "batch_size": setting.batch,
                "resident_megabytes": 0,
                "tables": {"kind": setting.optimizer},
            },
        }
    )


def _margin(setting: Setting) -> float:
    return 0.2 if setting.loss == "hinge" else 0.0


def draw_batch(trainer: Trainer, shapes: Shapes) -> Any:
    """Returns a batch of drawn ids, with the axis of the steps of a dispatch."""
    rng = np.random.default_rng(0)
    tables = trainer.model.tables

    def draw(most: int) -> np.ndarray:
        return rng.integers(1, most, (1, trainer.config.training.batch_size), dtype=np.int32)

    return {
        "user": draw(shapes.users),
        "item": draw(shapes.items),
        "weight": np.ones((1, trainer.config.training.batch_size), np.float32),
        "labels": {},
        "user_features": {"user_id": draw(tables["user.user_id"].rows)},
        "item_features": {"item_id": draw(tables["item.item_id"].rows)},
    }


def resident(name: str) -> int:
    """Returns a figure of the memory of this process, in bytes: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    app.run(main)
