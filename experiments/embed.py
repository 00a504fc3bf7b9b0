r"""Writes the vectors of all users and items of a run as Parquet: WORKDIR/embeddings/users and
/items, an id and a vector a row.

    python -m experiments.embed \
        --workdir=runs/quickstart [--checkpoint=best] [--out=FOLDER] [--devices=N] [--task=T --tasks=N]

Killed at any moment, the same command goes on. Several processes, on one machine or many, share the
work: give each its --task.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Which weights: best, latest or a step.")
_OUT = flags.DEFINE_string("out", None, "Where to write; by default WORKDIR/embeddings.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Devices to embed on; 0: all.", lower_bound=0)
_TASK = flags.DEFINE_integer(
    "task", 0, "Which of several processes this is, from 0 on.", lower_bound=0
)
_TASKS = flags.DEFINE_integer("tasks", 1, "How many processes share the work.", lower_bound=1)


def main() -> None:
    from twotower.retrieval.batch_jobs import Tasks, embed_all
    from twotower.training.run import load_run

    out = Path(_OUT.value or Path(_WORKDIR.value) / "embeddings")
    tasks = Tasks(_TASK.value, _TASKS.value)
    embed_all(
        load_run(Path(_WORKDIR.value), checkpoint=_CHECKPOINT.value),
        out,
        devices=_DEVICES.value,
        tasks=tasks,
    )
    print(f"{out}: users and items.")


if __name__ == "__main__":
    launch.run(main, required=["workdir"])
