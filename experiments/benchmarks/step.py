"""A whole training step against peers: the same model, data and batch size on one core, by default
and tuned.

    python -m experiments.benchmarks.step [--quick] [--batches=256,1024,4096] [--nouse_tensorflow]
        [--json=FILE] [--check] [--peers=FOLDER] [--core=N]

Two id tables of width 64, towers 128-64, L2-normalised, in-batch softmax at temperature 0.05,
Adagrad; 943 users, 1,682 items, 80,000 interactions. A turn is a pass over all of them, with
whatever each needs to shuffle and load. Ours are the compiled steps of `fit`, with the
sampling-bias correction and with accidental hits and the user's other positives masked, which
neither peer does here.

By default: nothing set in the environment; ours with dtype "auto" and dispatches as `fit` chooses
them, PyTorch eager, TensorFlow a step an execution. Tuned: freed memory kept, huge pages, a pass a
dispatch or execution, `torch.compile` around loss, gradients and optimizer (or the loss alone
beside a fused optimizer, or none, where that is faster). Peers take the faster of float32 and
bfloat16 in either row; an option is picked by the median of five passes in turns. Figures are
processor time.
"""

from __future__ import annotations

from absl import app, flags

from experiments.benchmarks import floors, harness, peers
from experiments.benchmarks.contestants.turn import INTERACTIONS

_BATCHES = flags.DEFINE_list("batches", [], "Sizes of a batch; by default three, one if quick.")
_TENSORFLOW = flags.DEFINE_bool("use_tensorflow", True, "Measure TensorFlow Recommenders as well.")

# Least times of the peers to ours, by row; about nine tenths of what was measured.
FLOORS = {
    "256 default, PyTorch": 2.2,
    "256 tuned, PyTorch": 1.8,
    "1024 default, PyTorch": 2.1,
    "1024 tuned, PyTorch": 1.2,
    "4096 default, PyTorch": 5.7,
    "4096 tuned, PyTorch": 1.4,
}


def main(argv: list[str]) -> None:
    del argv
    sides = {"twotower": "twotower", "PyTorch": "torch"}
    if _TENSORFLOW.value:
        sides["TensorFlow Recommenders"] = "tensorflow"
    figures = {}
    ratios = {}
    batches = ["1024"] if harness.QUICK.value else ["256", "1024", "4096"]
    for batch in map(int, _BATCHES.value or batches):
        for row in ("default", "tuned"):
            times = measure(sides, batch, tuned=row == "tuned")
            title = f"step, B = {batch:,}, {row}"
            table = harness.table(title, times, unit="ms a step", base="twotower")
            figures[title] = table
            ratios |= {f"{batch} {row}, {name}": x["best_ratio"] for name, x in table.items()}
    harness.write_json("step", figures, unit="ms a step", base="twotower")
    floors.check(ratios, FLOORS)


def measure(sides: dict[str, str], batch: int, *, tuned: bool) -> dict[str, list[float]]:
    """Returns the milliseconds a step of each side, one figure a pass."""
    quick = harness.QUICK.value
    task = {"task": "step", "batch": batch, "tuned": tuned, "quick": quick}
    wanted = {name: (side, task) for name, side in sides.items()}
    with peers.workers(wanted) as found:
        once = dict.fromkeys(found, 1)
        times = peers.turns(found, rounds=4 if quick else 8, repeats=once)
        for name, worker in found.items():
            print(f"{name}: {worker.note}", flush=True)
    steps = INTERACTIONS // batch
    return {name: [x / steps for x in passes] for name, passes in times.items()}


if __name__ == "__main__":
    app.run(main)
