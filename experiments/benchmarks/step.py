"""A whole training step against tuned peers: the same model, data and batch size, best against best
on one core.

    python -m experiments.benchmarks.step [--quick] [--json=FILE] [--peers=FOLDER] [--core=N]

Two id tables of width 64, towers 128-64, L2-normalised, in-batch softmax at temperature 0.05,
Adagrad; 943 users, 1,682 items, 80,000 interactions. A turn is a pass over all of them, with
whatever each needs to shuffle and load. Ours are the compiled steps of `fit`, with the
sampling-bias correction and with accidental hits and the user's other positives masked, which
neither peer does here. Each chooses its best options by time, float32 or bfloat16 among them, as it
is warmed up, but not with --quick. Figures are processor time.
"""

from __future__ import annotations

from absl import app

from experiments.benchmarks import harness, peers
from experiments.benchmarks.contestants.turn import INTERACTIONS

_PEERS = {"PyTorch": "torch", "TensorFlow Recommenders": "tensorflow"}


def main(argv: list[str]) -> None:
    figures = {}
    for batch in (1024,) if harness.QUICK.value else (256, 1024, 4096):
        task = {"task": "step", "batch": batch, "quick": harness.QUICK.value}
        wanted = {"twotower": ("twotower", task)} | {
            name: (peer, task) for name, peer in _PEERS.items()
        }
        with peers.workers(wanted) as found:
            times = peers.turns(
                found, rounds=4 if harness.QUICK.value else 8, repeats=dict.fromkeys(found, 1)
            )
            for name, worker in found.items():
                print(f"{name}: {worker.note}")
        steps = INTERACTIONS // batch
        times = {name: [x / steps for x in passes] for name, passes in times.items()}
        figures[f"B = {batch:,}"] = harness.table(
            f"step, B = {batch:,}", times, unit="ms a step", base="twotower"
        )
    harness.write_json("step", figures, unit="ms a step", base="twotower")


if __name__ == "__main__":
    app.run(main)
