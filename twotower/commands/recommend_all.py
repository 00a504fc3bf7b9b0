r"""Writes the best K items of every known user as Parquet: user_id, rank, item_id, score.

    twotower recommend_all --workdir=runs/quickstart --k=100 [--approximate] \
        [--rerank=mmr:diversity=0.5] [--devices=N] [--task=T --tasks=N]

The files lie in parts under WORKDIR/recommendations. The search is exact, over the items divided
over the devices, unless --approximate takes the bundle's index, or, on TPUs, a share of the best
items is enough: --recall_target=.95. Killed at any moment, the same command goes on. Several
processes share the work: give each its --task, and the last one writes NAME_manifest.json beside.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from twotower.commands import launch, mlflow_flags

FLAGS = flags.FlagValues()
# The bundle is enough: it holds the vectors of the known users.
_RUN = mlflow_flags.define_run(FLAGS, "bundle")
_OUT = flags.DEFINE_string(
    "out", None, "Folder to write to; by default WORKDIR/recommendations.", flag_values=FLAGS
)
_K = flags.DEFINE_integer("k", 10, "Length of the lists.", lower_bound=1, flag_values=FLAGS)
_EXCLUDE_SEEN = flags.DEFINE_bool(
    "exclude_seen", True, "Leave out the items that a user has seen.", flag_values=FLAGS
)
_APPROXIMATE = flags.DEFINE_bool(
    "approximate",
    False,
    "Search the bundle's index instead of comparing all items.",
    flag_values=FLAGS,
)
# Other devices select exactly all the same; see `ExactIndex`.
_RECALL_TARGET = flags.DEFINE_float(
    "recall_target",
    1.0,
    "TPUs alone: the share of the best items that lists must hold.",
    lower_bound=0.01,
    upper_bound=1.0,
    flag_values=FLAGS,
)
_RERANK = launch.define_rerank(FLAGS)
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Devices to search on; 0: all.", lower_bound=0, flag_values=FLAGS
)
_TASK = flags.DEFINE_integer(
    "task", 0, "Number of this process, from 0 on.", lower_bound=0, flag_values=FLAGS
)
_TASKS = flags.DEFINE_integer(
    "tasks", 1, "Processes that share the work.", lower_bound=1, flag_values=FLAGS
)


def main() -> None:
    # The plugins of a run alone: neither training nor a checkpoint is needed for lists.
    from twotower.plugins import load_config
    from twotower.retrieval.batch.jobs import Tasks, recommend_all

    workdir = _RUN.folder()
    load_config(workdir)  # says what to do where the folder is no run
    out = Path(_OUT.value or _RUN.output(workdir, "recommendations"))
    recommend_all(
        workdir / "bundle",
        out,
        _K.value,
        exclude_seen=_EXCLUDE_SEEN.value,
        approximate=_APPROXIMATE.value,
        devices=_DEVICES.value,
        recall_target=_RECALL_TARGET.value,
        rerank=_RERANK.value,
        tasks=Tasks(_TASK.value, _TASKS.value),
    )
    print(f"{out}: lists of {_K.value}.")
