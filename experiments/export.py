r"""Makes the bundle of a run: embeds the corpus, builds the index, writes WORKDIR/bundle.

    python -m experiments.export \
        --workdir=runs/quickstart [--checkpoint=best] [--target_recall=.95 --k=100] [--plot=index.png]
        [--dim=32] [--vectors=int8]

Prints what was tried for the index, and what it was measured to find; of vectors that are cut or
rounded, what that loses.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Which weights: best, latest or a step.")
_TARGET_RECALL = flags.DEFINE_float(
    "target_recall",
    None,
    "Share of the exact lists that the index must find, in the place of the configuration's.",
    0.0,
    1.0,
)
_K = flags.DEFINE_integer("k", None, "Length of those lists, likewise.", lower_bound=1)
_DIM = flags.DEFINE_integer(
    "dim",
    None,
    "Width that vectors are cut to, likewise; one of config.objective.matryoshka.",
    lower_bound=1,
)
_VECTORS = flags.DEFINE_enum(
    "vectors", None, ["float32", "int8"], "How item vectors are stored, likewise."
)
_PLOT = flags.DEFINE_string(
    "plot", None, "Draw recall against queries per second into this file (extra: plots)."
)


def main() -> None:
    from twotower.index.tuning_report import format_tuning, plot_tuning
    from twotower.retrieval.export import export
    from twotower.training.run import load_run

    folder = Path(_WORKDIR.value) / "bundle"
    bundle = export(
        with_index_of(load_run(Path(_WORKDIR.value), checkpoint=_CHECKPOINT.value)), folder
    )
    tuning = getattr(bundle.index, "tuning", None)
    if tuning is not None:
        print(format_tuning(tuning))
    if _PLOT.value and tuning is not None and tuning.tried:
        plot_tuning(tuning.tried, tuning.target_recall, Path(_PLOT.value))
    if "against_full" in bundle.manifest:
        print(describe_loss(bundle))
    print(
        f"{folder}: {len(bundle.items):,} items, {len(bundle.users):,} users, {describe(bundle.index)}."
    )


def with_index_of(run):
    """The run with the index that the flags ask for."""
    given = {
        "target_recall": _TARGET_RECALL.value,
        "k": _K.value,
        "dim": _DIM.value,
        "vectors": _VECTORS.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(
        run.config, retrieval=dataclasses.replace(run.config.retrieval, **given)
    )
    return dataclasses.replace(run, config=config)


def describe(index) -> str:
    """The index in words."""
    tuning = getattr(index, "tuning", None)
    if tuning is None or not tuning.efforts:
        return f"{index.kind} index"
    effort = tuning.efforts[0]
    return (
        f"{index.kind} index that searches {effort.leaves} of {tuning.num_leaves} leaves and finds {effort.recall:.1%} of the "
        f"exact top {effort.k}"
    )


def describe_loss(bundle) -> str:
    """What the vectors as they are stored lose, in words."""
    found, dim, kind = (
        bundle.manifest["against_full"],
        bundle.towers.dim,
        bundle.config.retrieval.vectors,
    )
    measured = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if "@" in name)
    asked = f"exact lists of {found['users']:,} users"
    return (
        f"{kind} vectors {dim} wide against float32 ones {found['dim']} wide, {asked}: {measured}."
    )


if __name__ == "__main__":
    launch.run(main, required=["workdir"])
