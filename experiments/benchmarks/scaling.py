"""Communication and arithmetic of the devices in a step, read from the compiled
program, beside a formula.

    python -m experiments.benchmarks.scaling [--quick] [--json=FILE] [--torch_python=PYTHON]

The model: two id tables [V, D], towers of two dense layers (2 D, D), softmax over the batch of B
with the logQ correction, on n devices. A ring of n gathers, or scatters, an array of S bytes with
(n - 1) / n S bytes sent by each; an all-reduce is both.

A step gathers the ids asked of each table (4 B bytes), reduce-scatters the rows to those who asked
(4 B D) and gathers their gradients (4 B D); gathers the item vectors (4 B D), reduce-scatters their
gradients (4 B D), and gathers the items' ids and owners (8 B); and sums the P dense gradients and
three scalars (the weights, the loss, the norm of the rows' gradients). So each device sends

    (n - 1) / n (2 tables (4 B + 8 B D) + 8 B D + 8 B) + 2 (n - 1) / n 4 (P + 3) = (n - 1) / n (24 B
    D + 16 B + 8 (P + 3)) bytes,

in which V has no part, and which hardly grows with n. Its matrix products are three of the loss
(scores, and a gradient to each side) of B / n queries with B candidates, and three to each dense
layer (forward, and a gradient to its kernel and its input):

    6 B / n (B D + K) FLOP,  K = 2 (D 2 D + 2 D D) = 8 D^2 numbers in the kernels,  P = K + 6 D
    biases + 1 temperature.

Both are asserted to the byte and to the FLOP. On a GPU, where there is one, a step is also timed,
ten to a dispatch, with products in float32 (TensorFloat-32, as JAX and PyTorch are set here) and in
bfloat16: examples a second, and FLOP/s and bytes/s against what the card itself is measured to do,
beside PyTorch (`scaling_torch.py`, by --torch_python) on that card. Of the bytes, those are counted
that no way of doing it can save: a row is read for the towers, its gradient written, read and
summed, the sum read, and the row read and written by the update, for both tables: 2 x 7 x 4 B D.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh, PartitionSpec

from experiments.benchmarks import harness, hlo

_TORCH = flags.DEFINE_string("torch_python", sys.executable, "A Python with PyTorch for this GPU.")
_DEVICES = (1, 2, 4, 8)
_STEPS, _TOGETHER = 50, 10  # timed at once; of a dispatch


class Setting(NamedTuple):
    """D, B, V and n of the module's docstring."""

    width: int
    batch: int
    rows: int
    devices: int

    @property
    def dense(self) -> tuple[int, int]:
        """K and P."""
        kernels = 8 * self.width**2
        return kernels, kernels + 6 * self.width + 1

    def sent(self) -> float:
        """Bytes that each device sends in a step."""
        whole = 24 * self.batch * self.width + 16 * self.batch + 8 * (self.dense[1] + 3)
        return whole * (self.devices - 1) / self.devices

    def flops(self) -> float:
        """Returns the operations of the matrix products of one device."""
        return 6 * self.batch / self.devices * (self.batch * self.width + self.dense[0])

    def moved(self) -> float:
        """Bytes of memory that cannot be saved."""
        return 2 * 7 * 4 * self.batch * self.width


_BASE = Setting(width=32, batch=4096, rows=100_352, devices=4)


def settings(quick: bool) -> list[Setting]:
    """The base, and each quantity changed alone."""
    changed = [_BASE._replace(devices=n) for n in ((1, 4) if quick else _DEVICES)]
    changed += [_BASE._replace(rows=10 * _BASE.rows)]
    if not quick:
        changed += [
            _BASE._replace(width=64),
            _BASE._replace(width=128),
            _BASE._replace(batch=8192),
            _BASE._replace(batch=16_384),
        ]
    return changed


def main(argv: list[str]) -> None:
    del argv
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # PyTorch needs a part of the card
    jax.config.update("jax_num_cpu_devices", max(_DEVICES))
    rows = [measured(setting) for setting in settings(harness.QUICK.value)]
    on_gpu: dict[str, Any] = {}
    if jax.default_backend() == "gpu":
        on_gpu = gpu()
    else:
        print("No GPU: nothing is timed.")
    if harness.JSON.value:
        Path(harness.JSON.value).write_text(
            json.dumps({"benchmark": "scaling", "results": rows, "gpu": on_gpu}, indent=2)
        )


def measured(setting: Setting) -> dict[str, Any]:
    """Bytes and FLOP of the compiled step beside what the formulas say; prints a line, and asserts
    that they agree."""
    mesh = Mesh(np.asarray(jax.devices("cpu")[: setting.devices]), ("devices",))
    program = hlo.read(compiled(setting, mesh).as_text())
    found = program.collectives()
    sent, flops = sum(collective.sent(setting.devices) for collective in found), program.flops()
    if setting == _BASE._replace(devices=1):
        print(
            f"{'D':>5}{'B':>8}{'V':>11}{'n':>4}{'collectives':>13}"
            f"{'bytes sent':>14}{'formula':>14}{'FLOP':>16}{'formula':>16}"
        )
    shape = f"{setting.width:5}{setting.batch:8,}{setting.rows:11,}{setting.devices:4}"
    print(
        f"{shape}{len(found):13}{sent:14,.0f}{setting.sent():14,.0f}"
        f"{flops:16,}{setting.flops():16,.0f}",
        flush=True,
    )
    assert sent == setting.sent() and flops == setting.flops(), (
        "The compiled step is not what the formulas say."
    )
    assert not any(collective.in_loop for collective in found)
    return setting._asdict() | {"collectives": len(found), "sent": sent, "flops": flops}


def trainer_of(setting: Setting, dtype: str = "float32") -> Any:
    from twotower.config import from_dict
    from twotower.features.inputs import Input, TableShape
    from twotower.towers.two_tower import TwoTower
    from twotower.training.candidates import CorpusSize
    from twotower.training.state import Trainer

    layers = {"layers": (2 * setting.width, setting.width)}
    config = from_dict(
        {
            "model": {"user": layers, "item": layers, "dtype": dtype},
            "objective": {"negatives": {"uniform": 0}},
            "training": {"batch_size": setting.batch},
        }
    )
    inputs = {side: {"id": Input(table=side)} for side in ("user", "item")}
    model = TwoTower.build_from(
        config.model, inputs, {side: TableShape(setting.rows, setting.width) for side in inputs}
    )
    return Trainer.build(config, model, CorpusSize(setting.rows, setting.rows, 0))


def compiled(setting: Setting, mesh: Mesh, *, steps: int = 0, dtype: str = "float32") -> Any:
    """The step, or several to a dispatch, compiled from shapes alone: (state, batch or stacked
    batches) -> (state, metrics)."""
    from twotower.core.mesh import (
        REPLICATED,
        SHARDED,
        compiler_options,
        device_group,
        shard_map_if_needed,
        shardings,
    )
    from twotower.training.init import abstract_state
    from twotower.training.state import state_specs
    from twotower.training.step import train_step

    trainer, group = trainer_of(setting, dtype), device_group(mesh)
    state = abstract_state(trainer, mesh)
    specs, split = state_specs(state), PartitionSpec(None, *SHARDED) if steps else SHARDED
    shape, sharding = (steps, setting.batch) if steps else (setting.batch,), shardings(mesh, split)
    ids, weight = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in ("int32", "float32")
    )
    features = {f"{side}_features": {"id": ids} for side in ("user", "item")}
    batch = {"user": ids, "item": ids, "weight": weight, "labels": {}} | features

    def one(state: Any, batch: Any) -> tuple[Any, Any]:
        return train_step(state, batch, {}, trainer=trainer, group=group)

    def several(state: Any, batches: Any) -> tuple[Any, Any]:
        return jax.lax.scan(one, state, batches)

    step = shard_map_if_needed(mesh, several if steps else one, (specs, split), (specs, REPLICATED))
    return (
        jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))
        .lower(state, batch)
        .compile()
    )


def gpu() -> dict[str, Any]:
    """Times a step on the card and prints what it reaches of the card's peaks, then PyTorch's."""
    card = jax.devices("gpu")[0]
    peaks: dict[str, float] = {dtype: _peak_flops(dtype) for dtype in ("float32", "bfloat16")} | {
        "bytes": _peak_bytes()
    }
    shown = ", ".join(
        f"{peaks[dtype] / 1e12:.0f} TFLOP/s of {dtype}" for dtype in ("float32", "bfloat16")
    )
    print(f"\n{card.device_kind}: measured peaks {shown}, {peaks['bytes'] / 1e9:,.0f} GB/s")
    print(
        f"{'B':>8}  {'':32}{'ms':>9}{'examples/s':>14}{'TFLOP/s':>10}{'of peak':>9}"
        f"{'GB/s':>8}{'of peak':>9}{'to ours':>9}"
    )
    found: dict[tuple[int, str], float] = {}
    batches = (1024, 4096) if harness.QUICK.value else (1024, 4096, 16_384, 65_536)
    settings = {
        batch: Setting(width=64, batch=batch, rows=1_000_448, devices=1) for batch in batches
    }

    def show(*, batch: int, name: str, taken: float) -> None:
        setting, found[batch, name] = settings[batch], taken
        rate, moved, peak = (
            setting.flops() / taken,
            setting.moved() / taken,
            peaks[name.rpartition(" ")[2]],
        )
        best = min(
            seconds
            for (b, who), seconds in found.items()
            if b == batch and who.startswith("twotower")
        )
        print(
            f"{batch:8,}  {name:32}{taken * 1e3:9.3f}{batch / taken:14,.0f}"
            f"{rate / 1e12:10.2f}{rate / peak:9.1%}"
            f"{moved / 1e9:8.0f}{moved / peaks['bytes']:9.1%}{taken / best:9.2f}",
            flush=True,
        )

    for batch, setting in settings.items():
        for dtype in ("float32", "bfloat16"):
            taken = step_seconds(setting, card, dtype)
            show(batch=batch, name=f"twotower, {dtype}", taken=taken)
    _torch_seconds(settings[batches[0]], batches, show)
    return {
        "card": card.device_kind,
        "peaks": peaks,
        "seconds": {f"{name} {batch}": x for (batch, name), x in found.items()},
    }


def step_seconds(setting: Setting, device: Any, dtype: str) -> float:
    """The best time of a step, with its batches on the device and its state donated."""
    from twotower.training.init import init_on

    mesh = Mesh(np.asarray([device]), ("devices",))
    program, rng = compiled(setting, mesh, steps=_TOGETHER, dtype=dtype), np.random.default_rng(0)
    ones = np.ones(setting.rows, np.float32)
    counts = {"user": ones, "item": ones, "rows": np.asarray(setting.rows, np.float32)}
    state = [init_on(mesh, trainer_of(setting, dtype), counts)]
    user, item = (
        rng.integers(1, setting.rows, (_TOGETHER, setting.batch)).astype(np.int32) for _ in range(2)
    )
    features = {"user_features": {"id": user}, "item_features": {"id": item}}
    values = {
        "user": user,
        "item": item,
        "weight": np.ones(user.shape, np.float32),
        "labels": {},
    } | features
    batches = jax.device_put(values, program.input_shardings[0][1])

    def run() -> None:
        for _ in range(_STEPS // _TOGETHER):
            state[0], _ = program(state[0], batches)
        jax.block_until_ready(state[0])

    return _best(run) / _STEPS


def _torch_seconds(setting: Setting, batches: Sequence[int], show: Callable[..., None]) -> None:
    """Tells `show` each figure as soon as it is there: compiling takes PyTorch minutes."""
    command = [
        _TORCH.value,
        "-m",
        "experiments.benchmarks.scaling_torch",
        *map(str, (setting.width, setting.rows, *batches)),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as peer:
        for line in peer.stdout or ():
            show(**json.loads(line))
    if peer.returncode:
        print("PyTorch ended before it had measured all: see above.")


def _peak_flops(dtype: str, size: int = 8192) -> float:
    # Not of ones or zeros, which a card multiplies faster.
    x, multiply = jax.random.normal(jax.random.key(0), (size, size), dtype), jax.jit(jnp.matmul)
    return 2 * size**3 / _best(lambda: multiply(x, x).block_until_ready())


def _peak_bytes(size: int = 2**28) -> float:
    x = jax.random.normal(jax.random.key(0), (size,))
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best(lambda: copy(x).block_until_ready())


def _best(run: Callable[[], None], rounds: int = 10) -> float:
    """Seconds of the fastest of some rounds, the first not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    app.run(main)
