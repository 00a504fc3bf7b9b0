"""Makes the bundle of a run: embeds the corpus, builds the index, writes WORKDIR/bundle.

python -m experiments.export --workdir=runs/quickstart [--checkpoint=best]
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Which weights: best, latest or a step.")


def main() -> None:
    from twotower.retrieval.export import export
    from twotower.training.run import load_run

    folder = Path(_WORKDIR.value) / "bundle"
    bundle = export(load_run(Path(_WORKDIR.value), checkpoint=_CHECKPOINT.value), folder)
    print(f"{folder}: {len(bundle.items):,} items, {len(bundle.users):,} users, {describe(bundle.index)}.")


def describe(index) -> str:
    """The index in words."""
    tuning = getattr(index, "tuning", None)
    if tuning is None or not tuning.num_leaves:
        return f"{index.kind} index"
    return (
        f"{index.kind} index that searches {tuning.leaves_to_search} of {tuning.num_leaves} leaves and finds "
        f"{tuning.measured_recall:.1%} of the exact top 10"
    )


if __name__ == "__main__":
    launch.run(main, required=["workdir"])
