r"""Writes the vectors of all users and items of a run as Parquet: an id and a vector a row.

    twotower embed --workdir=runs/quickstart [--checkpoint=best] [--out=FOLDER] \
        [--devices=N] [--task=T --tasks=N]

The files lie in WORKDIR/embeddings/users and /items. Killed at any moment, the same command goes
on. Several processes, on one machine or many, share the work: give each its --task. The last one
writes users_manifest.json and items_manifest.json beside them.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from twotower.commands import mlflow_flags

FLAGS = flags.FlagValues()
# The run itself, not its bundle: the weights of a checkpoint are read.
_RUN = mlflow_flags.define_run(FLAGS, "run")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "Weights: best, latest or a step.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "Folder to write to; by default WORKDIR/embeddings.", flag_values=FLAGS
)
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Devices to embed on; 0: all.", lower_bound=0, flag_values=FLAGS
)
_TASK = flags.DEFINE_integer(
    "task", 0, "Number of this process, from 0 on.", lower_bound=0, flag_values=FLAGS
)
_TASKS = flags.DEFINE_integer(
    "tasks", 1, "Processes that share the work.", lower_bound=1, flag_values=FLAGS
)


def main() -> None:
    # In `main`, as in every command: --help and a wrong flag need not wait for JAX.
    from twotower import api
    from twotower.retrieval.batch.jobs import Tasks, embed_all

    run = api.load_run(_RUN.folder(), checkpoint=_CHECKPOINT.value)
    out = Path(_OUT.value or run.workdir / "embeddings")
    embed_all(run, out, devices=_DEVICES.value, tasks=Tasks(_TASK.value, _TASKS.value))
    print(f"{out}: users and items.")
