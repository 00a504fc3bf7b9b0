"""A step of the sequential model against the same in PyTorch: all positions of full histories, best
against best on one core.

    python -m experiments.benchmarks.sequence [--quick] [--json=FILE] [--peers=FOLDER] [--core=N]

Two pre-norm blocks of width 64 with two heads, learned positions, dropout .2, full cross-entropy
over 3,416 items, Adam. Every user fills a row, so that packing short histories, which PyTorch's
padded rows do not, gains nothing here. Each chooses its best options by time, ours float32 or
bfloat16 among them, but not with --quick; PyTorch's bfloat16 is autocast's. Figures are processor
time; sequences a second are the batch over it.
"""

from __future__ import annotations

from absl import app

from experiments.benchmarks import harness, peers


def main(argv: list[str]) -> None:
    figures = {}
    for length, batch in ((50, 32),) if harness.QUICK.value else ((50, 128), (200, 32)):
        task = {"task": "sequence", "length": length, "batch": batch, "quick": harness.QUICK.value}
        torch = {
            f"PyTorch, {'bfloat16' if half else 'float32'}": ("torch", task | {"half": half})
            for half in (False, True)
        }
        with peers.workers({"twotower": ("twotower", task)} | torch) as found:
            times = peers.turns(
                found, rounds=4 if harness.QUICK.value else 8, repeats=dict.fromkeys(found, 1)
            )
            for name, worker in found.items():
                rate = 1e3 * batch / min(times[name])
                print(f"{name}: {worker.note}; {rate:,.0f} sequences a second")
        title = f"sequence step, L = {length}, B = {batch}"
        figures[f"L = {length}"] = harness.table(title, times, unit="ms a step", base="twotower")
    harness.write_json("sequence", figures, unit="ms a step", base="twotower")


if __name__ == "__main__":
    app.run(main)
