"""The softmax loss on a GPU: the kernels that write no logits, the blocks of queries, and peers.

    python -m experiments.benchmarks.loss_gpu [--quick] [--json=FILE] [--torch_python=PYTHON]

First value and gradients of the kernels and of the blocks are compared with the plain float32
reference, on few vectors with every mask, correction and hard negative on. Then value and gradient
(by queries, items and temperature) of the in-batch softmax, D = 64, are timed as in `loss.py`, with
logQ, accidental hits and users masked, in bfloat16 and float32 (TensorFloat-32, as JAX is set):

    pallas    `config.objective.softmax_kernel = "pallas"`, 8 B^2 D FLOP
    blocks    the default, 6 B^2 D FLOP and some 26 bytes of memory for a logit

then pallas with other tiles, the best of which belong into `softmax_pallas.TILES`; and in the end,
where --torch_python has them, PyTorch's losses (`loss_torch.py`), which know no masks. Each line is
printed as soon as it is measured, and nothing is begun after seven minutes.

Without a GPU nothing is timed: the kernels are compared by Pallas's interpreter, on a tiny shape.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import harness, loss
from twotower.kernels import softmax_pallas
from twotower.kernels.softmax_pallas import Tiles
from twotower.kernels.softmax_reference import naive_softmax
from twotower.kernels.streaming_softmax import streaming_softmax

_TORCH = flags.DEFINE_string("torch_python", sys.executable, "A Python with PyTorch for this GPU.")
_SECONDS = 420
_SIZES = (65_536, 16_384, 4096, 1024)
_QUICK_SIZES = (16_384, 4096)
_ROUNDS = 5
_ROUND_MILLISECONDS = 200.0
# Of those that Triton compiles without spills for vectors of 128 bytes.
_TRIALS = (
    Tiles(128, 64, 4, 2),
    Tiles(128, 64, 4, 4),
    Tiles(64, 64, 4, 3),
    Tiles(128, 128, 8, 2),
    Tiles(128, 128, 8, 3),
    Tiles(64, 128, 4, 2),
    Tiles(128, 64, 8, 3),
    Tiles(256, 64, 8, 3),
)
# (inputs, options) -> loss.
Form = Callable[..., jax.Array]
_PALLAS = functools.partial(streaming_softmax, kernel="pallas")
_LOSSES = ("softmax", "corrected_softmax", "bsl")


def main(argv: list[str]) -> None:
    # PyTorch needs a part of the card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    deadline = time.perf_counter() + _SECONDS
    on_gpu = jax.default_backend() == "gpu"
    results: dict[str, Any] = {"backend": jax.default_backend()}
    if on_gpu:
        results["card"] = jax.devices()[0].device_kind
        for dtype in (jnp.bfloat16, jnp.float32):
            # Raises: `streaming_softmax` would take blocks in the kernels' place.
            options = softmax_pallas.PallasOptions(jnp.dtype(dtype), masks_users=True)
            softmax_pallas.try_kernels(options, loss.WIDTH)
        results["differences"] = _differences(_LOSSES, 1000, _PALLAS)
        results["milliseconds"] = _measure(deadline)
    else:
        print("No GPU: nothing is timed, and the kernels are run by Pallas's interpreter.")
        interpreted = functools.partial(_PALLAS, interpret=True)
        results["differences"] = _differences(_LOSSES[:1], 24, interpreted)
    harness.write_json("loss_gpu", results, unit="ms for value and gradient", base="pallas")


def _differences(losses: Sequence[str], size: int, pallas: Form) -> dict[str, float]:
    """Prints the largest differences of a value or gradient from the float32 reference, relative
    to the largest number of its array."""
    half = functools.partial(functools.partial, dtype=jnp.bfloat16)
    forms = {
        "pallas, float32": pallas,
        "pallas, bfloat16": half(pallas),
        "blocks, bfloat16": half(streaming_softmax),
    }
    found = {}
    print("Largest relative difference from the float32 reference, everything on:")
    for name in losses:
        for form_name, form in forms.items():
            # TensorFloat-32 would be compared with itself.
            with jax.default_matmul_precision("highest"):
                difference = loss.difference(name, size, (naive_softmax, form), jnp.float32)
            found[f"{name}, {form_name}"] = difference
            print(f"  {name + ', ' + form_name:40}{difference:.1e}", flush=True)
    return found


def _measure(deadline: float) -> dict[str, float]:
    """Prints and returns the milliseconds of every form at every size, ours first."""
    sizes = _QUICK_SIZES if harness.QUICK.value else _SIZES
    found: dict[str, float] = {}
    title = f"{'B':>8}  {'form':44}{'ms':>10}{'TFLOP/s':>10}{'temporary MB':>14}{'to pallas':>11}"
    print(title)

    def show(size: int, name: str, ms: float, products: int = 3, megabytes: float = 0.0) -> None:
        found[f"{name} {size}"] = ms
        rate = products * 2 * size**2 * loss.WIDTH / ms / 1e9
        ratio = ms / found.get(f"pallas, bfloat16 {size}", ms)
        row = f"{size:8,}  {name:44}{ms:10.3f}{rate:10.1f}{megabytes:14.1f}{ratio:11.2f}"
        print(row, flush=True)

    def run(size: int, name: str, form: Form, products: int) -> None:
        if time.perf_counter() > deadline:
            print(f"{size:8,}  {name:44} not begun: the time is up")
            return
        try:
            call, temporary = loss.compiled(form, size, mask_same_user=True)
            show(size, name, _milliseconds(call), products, temporary / 1e6)
        # Tiles that a card has no memory for: the others may fit.
        except Exception as error:
            print(f"{size:8,}  {name:44} {str(error).splitlines()[0]}", flush=True)

    for size in sizes:
        for dtype in (jnp.bfloat16, jnp.float32):
            word = jnp.dtype(dtype).name
            run(size, f"pallas, {word}", functools.partial(_PALLAS, dtype=dtype), 4)
            run(size, f"blocks, {word}", functools.partial(streaming_softmax, dtype=dtype), 3)
    shipped = dict(softmax_pallas.TILES)
    for tiles in _TRIALS:
        softmax_pallas.TILES[2 * loss.WIDTH] = tiles
        form = functools.partial(_PALLAS, dtype=jnp.bfloat16)
        run(sizes[0], f"pallas, {'x'.join(map(str, tiles))}", form, 4)
    softmax_pallas.TILES.update(shipped)
    _measure_torch(sizes, deadline, show)
    return found


def _milliseconds(call: Callable[[], jax.Array]) -> float:
    """Returns the time of the fastest of some rounds of calls, which follow each other without
    waiting for the device."""

    def run(times: int) -> float:
        start = time.perf_counter()
        results = [call() for _ in range(times)]
        jax.block_until_ready(results[-1])
        return (time.perf_counter() - start) / times * 1e3

    run(1)
    times = 1 + int(_ROUND_MILLISECONDS / run(1))
    return min(run(times) for _ in range(_ROUNDS))


def _measure_torch(sizes: Sequence[int], deadline: float, show: Callable[..., None]) -> None:
    """Tells `show` each figure as soon as it is there."""
    numbers = map(str, (loss.WIDTH, *sizes))
    command = [_TORCH.value, "-m", "experiments.benchmarks.loss_torch", *numbers]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as peer:
        timer = threading.Timer(max(1.0, deadline - time.perf_counter()), peer.kill)
        timer.start()
        for line in peer.stdout or ():
            figure = json.loads(line)
            if "missing" in figure:
                print(f"{figure['batch']:8,}  {figure['name']:44} {figure['missing']}", flush=True)
            else:
                show(figure["batch"], figure["name"], figure["taken"] * 1e3)
        timer.cancel()
    if peer.returncode:
        print("PyTorch ended before it had measured all: see above.")


if __name__ == "__main__":
    app.run(main)
