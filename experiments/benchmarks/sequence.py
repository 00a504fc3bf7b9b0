"""A step of the sequential model against PyTorch: all positions of full histories, on one core, by
default and tuned.

    python -m experiments.benchmarks.sequence [--quick] [--json=FILE] [--check] [--peers=FOLDER]
        [--core=N]

Two pre-norm blocks of width 64 with two heads, learned positions, dropout .2, full cross-entropy
over 3,416 items, Adam. Every user fills a row, so that packing short histories, which PyTorch's
padded rows do not, gains nothing here. By default: nothing set in the environment, ours with dtype
"auto", PyTorch eager. Tuned: freed memory kept, huge pages, `torch.compile` around loss, gradients
and optimizer, or eager with a fused one. PyTorch takes the faster of float32 and bfloat16 (by
autocast), and ours too when tuned, by the median of five passes in turns. Figures are processor
time; sequences a second are the batch over it.
"""

from __future__ import annotations

from absl import app

from experiments.benchmarks import floors, harness, peers

# Least times of PyTorch to ours, by row; about nine tenths of what was measured, and less where a
# row was measured long ago.
FLOORS = {
    "50 default, PyTorch": 2.2,
    "50 tuned, PyTorch": 1.3,
    "200 default, PyTorch": 1.3,
    "200 tuned, PyTorch": 1.1,
}


def main(argv: list[str]) -> None:
    del argv
    figures = {}
    ratios = {}
    for length, batch in ((50, 32),) if harness.QUICK.value else ((50, 128), (200, 32)):
        for row in ("default", "tuned"):
            times = measure(length, batch, tuned=row == "tuned")
            title = f"sequence step, L = {length}, B = {batch}, {row}"
            table = harness.table(title, times, unit="ms a step", base="twotower")
            figures[title] = table
            ratios |= {f"{length} {row}, {name}": x["best_ratio"] for name, x in table.items()}
    harness.write_json("sequence", figures, unit="ms a step", base="twotower")
    floors.check(ratios, FLOORS)


def measure(length: int, batch: int, *, tuned: bool) -> dict[str, list[float]]:
    """Returns the milliseconds a step of both sides, one figure a turn."""
    quick = harness.QUICK.value
    task = {"task": "sequence", "length": length, "batch": batch, "tuned": tuned, "quick": quick}
    with peers.workers({"twotower": ("twotower", task), "PyTorch": ("torch", task)}) as found:
        once = dict.fromkeys(found, 1)
        times = peers.turns(found, rounds=4 if quick else 8, repeats=once)
        for name, worker in found.items():
            rate = 1e3 * batch / min(times[name])
            print(f"{name}: {worker.note}; {rate:,.0f} sequences a second", flush=True)
    return times


if __name__ == "__main__":
    app.run(main)
