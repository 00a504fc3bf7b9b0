"""What do devices say to each other in a step, and what do they compute? Read from the compiled program, beside a formula.

    python -m experiments.benchmarks.scaling [--quick] [--json=FILE] [--torch_python=PYTHON]

The model: two id tables [V, D], towers of two dense layers (2 D, D), softmax over the batch of B with the logQ correction, on n
devices. A ring of n gathers, or scatters, an array of S bytes with (n - 1) / n S bytes sent by each; an all-reduce is both.

A step gathers the ids asked of each table (4 B bytes), reduce-scatters the rows to those who asked (4 B D) and gathers their
gradients (4 B D); gathers the item vectors (4 B D), reduce-scatters their gradients (4 B D), and gathers the items' ids and
owners (8 B); and sums the P dense gradients and three scalars (the weights, the loss, the norm of the rows' gradients). So each
device sends

    (n - 1) / n (2 tables (4 B + 8 B D) + 8 B D + 8 B) + 2 (n - 1) / n 4 (P + 3) = (n - 1) / n (24 B D + 16 B + 8 (P + 3)) bytes,

in which V has no part, and which hardly grows with n. Its matrix products are three of the loss (scores, and a gradient to each
side) of B / n queries with B candidates, and three to each dense layer (forward, and a gradient to its kernel and its input):

    6 B / n (B D + K) FLOP,  K = 2 (D 2 D + 2 D D) = 8 D^2 numbers in the kernels,  P = K + 6 D biases + 1 temperature.

Both are asserted to the byte and to the FLOP. On a GPU, where there is one, a step is also timed: examples a second, and FLOP/s
and bytes/s against what the card itself is measured to do, beside PyTorch (`scaling_torch.py`, by --torch_python) on that card.
Of the bytes, those are counted that no way of doing it can save: a row is read for the towers, its gradient written, read and
summed, the sum read, and the row read and written by the update, for both tables: 2 x 7 x 4 B D.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from experiments.benchmarks import harness, hlo

_TORCH = flags.DEFINE_string("torch_python", sys.executable, "A Python with PyTorch for this GPU.")
_DEVICES = (1, 2, 4, 8)


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
        """Of the matrix products of one device."""
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
        changed += [_BASE._replace(width=64), _BASE._replace(width=128), _BASE._replace(batch=8192), _BASE._replace(batch=16_384)]
    return changed


def main(argv: list[str]) -> None:
    del argv
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs a part of the card
    jax.config.update("jax_num_cpu_devices", max(_DEVICES))
    rows = [measured(setting) for setting in settings(harness.QUICK.value)]
    on_gpu: dict[str, Any] = {}
    if jax.default_backend() == "gpu":
        on_gpu = gpu()
    else:
        print("No GPU: nothing is timed.")
    if harness.JSON.value:
        Path(harness.JSON.value).write_text(json.dumps({"benchmark": "scaling", "results": rows, "gpu": on_gpu}, indent=2))


def measured(setting: Setting) -> dict[str, Any]:
    """Bytes and FLOP of the compiled step beside what the formulas say; prints a line, and asserts that they agree."""
    mesh = Mesh(np.asarray(jax.devices("cpu")[: setting.devices]), ("devices",))
    program = hlo.read(compiled(setting, mesh).as_text())
    found = program.collectives()
    sent, flops = sum(collective.sent(setting.devices) for collective in found), program.flops()
    if setting == _BASE._replace(devices=1):
        print(f"{'D':>5}{'B':>8}{'V':>11}{'n':>4}{'collectives':>13}{'bytes sent':>14}{'formula':>14}{'FLOP':>16}{'formula':>16}")
    shape = f"{setting.width:5}{setting.batch:8,}{setting.rows:11,}{setting.devices:4}"
    print(f"{shape}{len(found):13}{sent:14,.0f}{setting.sent():14,.0f}{flops:16,}{setting.flops():16,.0f}", flush=True)
    assert sent == setting.sent() and flops == setting.flops(), "The compiled step is not what the formulas say."
    assert not any(collective.in_loop for collective in found)
    return setting._asdict() | {"collectives": len(found), "sent": sent, "flops": flops}


def trainer_of(setting: Setting) -> Any:
    from twotower.config import from_dict
    from twotower.data.encodings import Input, TableShape
    from twotower.towers.two_tower import TwoTower
    from twotower.training.candidates import Corpus
    from twotower.training.state import Trainer

    layers = {"layers": (2 * setting.width, setting.width)}
    config = from_dict({
        "model": {"user": layers, "item": layers}, "objective": {"negatives": {"uniform": 0}},
        "training": {"batch_size": setting.batch},
    })  # fmt: skip
    inputs = {side: {"id": Input(table=side)} for side in ("user", "item")}
    model = TwoTower.build_from(config.model, inputs, {side: TableShape(setting.rows, setting.width) for side in inputs})
    return Trainer.build(config, model, Corpus(setting.rows, setting.rows, 0))


def compiled(setting: Setting, mesh: Mesh) -> Any:
    """The step, compiled from shapes alone."""
    from twotower.training.init import abstract_state
    from twotower.training.mesh import SPLIT, WHOLE, group_of, run_on, shardings, state_specs
    from twotower.training.step import train_step

    trainer, group = trainer_of(setting), group_of(mesh)
    state = abstract_state(trainer, mesh)
    specs, place = state_specs(state), shardings(mesh, SPLIT)
    ids, weight = (jax.ShapeDtypeStruct((setting.batch,), dtype, sharding=place) for dtype in ("int32", "float32"))
    features = {f"{side}_features": {"id": ids} for side in ("user", "item")}
    batch = {"user": ids, "item": ids, "weight": weight, "labels": {}} | features

    def one(state: Any, batch: Any) -> tuple[Any, Any]:
        return train_step(state, batch, {}, trainer=trainer, group=group)

    step = run_on(mesh, one, (specs, SPLIT), (specs, WHOLE))
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def gpu() -> dict[str, Any]:
    """Times a step on the card and prints what it reaches of the card's peaks, beside PyTorch."""
    card, results = jax.devices("gpu")[0], {}
    peaks = {"FLOP/s": _peak_flops(), "bytes/s": _peak_bytes()}
    print(f"\n{card.device_kind}: measured peaks {peaks['FLOP/s'] / 1e12:.1f} TFLOP/s (float32 as the default precision has it), "
          f"{peaks['bytes/s'] / 1e9:.0f} GB/s")  # fmt: skip
    print(f"{'B':>8}{'':>24}{'examples/s':>14}{'TFLOP/s':>10}{'of peak':>9}{'GB/s':>8}{'of peak':>9}{'to PyTorch':>12}")
    for batch in (1024, 4096) if harness.QUICK.value else (1024, 4096, 16_384, 65_536):
        setting = Setting(width=64, batch=batch, rows=1_000_448, devices=1)
        seconds = {"twotower": step_seconds(setting, card)} | _torch_seconds(setting)
        for name, taken in seconds.items():
            flops, moved = setting.flops() / taken, setting.moved() / taken
            ratio = seconds.get("PyTorch, torch.compile", float("nan")) / taken
            print(f"{batch:8,}{name:>24}{batch / taken:14,.0f}{flops / 1e12:10.2f}{flops / peaks['FLOP/s']:9.1%}"
                  f"{moved / 1e9:8.0f}{moved / peaks['bytes/s']:9.1%}{ratio:12.2f}", flush=True)  # fmt: skip
        results[str(batch)] = seconds
    return {"card": card.device_kind, "peaks": peaks, "seconds": results}


def step_seconds(setting: Setting, device: Any, steps: int = 50) -> float:
    """The best time of a step, with its batches on the device and its state donated."""
    from twotower.training.init import init_on

    mesh = Mesh(np.asarray([device]), ("devices",))
    step, rng = compiled(setting, mesh), np.random.default_rng(0)
    ones = np.ones(setting.rows, np.float32)
    state = [init_on(mesh, trainer_of(setting), {"user": ones, "item": ones, "rows": np.float32(setting.rows)})]

    def batch() -> dict[str, Any]:
        user, item = (rng.integers(1, setting.rows, setting.batch).astype(np.int32) for _ in range(2))
        features = {"user_features": {"id": user}, "item_features": {"id": item}}
        values = {"user": user, "item": item, "weight": np.ones(setting.batch, np.float32), "labels": {}} | features
        return jax.device_put(values, step.input_shardings[0][1])

    batches = [batch() for _ in range(8)]

    def run() -> None:
        for i in range(steps):
            state[0], metrics = step(state[0], batches[i % len(batches)])
        jax.block_until_ready(metrics["loss"])

    return _best(run) / steps


def _torch_seconds(setting: Setting) -> dict[str, float]:
    command = [_TORCH.value, "-m", "experiments.benchmarks.scaling_torch", *map(str, setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        print(f"Without PyTorch: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def _peak_flops(size: int = 8192) -> float:
    x, multiply = jnp.ones((size, size)), jax.jit(jnp.matmul)
    return 2 * size**3 / _best(lambda: multiply(x, x).block_until_ready())


def _peak_bytes(size: int = 2**28) -> float:
    x, copy = jnp.ones(size), jax.jit(lambda x: x + 1)
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
