r"""Trains and measures an experiment with one seed after another: what a figure is worth.

    python -m experiments.repeat --config=experiments/configs/yelp2018.py \
        --workdir=runs/yelp2018 [--seeds=3] [--baselines]

Prints the mean and the standard deviation of each metric over training.seed = 0, 1, ... and writes
what each seed gave to WORKDIR/repeat.json (repeat_validation.json for --split=validation). The run
of a seed is WORKDIR/seed-N: a training that was stopped goes on, and one that had ended is only
measured.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import launch

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a Python file with get_config()."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many.", lower_bound=1)
_BASELINES = flags.DEFINE_bool(
    "baselines", False, "Measure popularity and the like beside the model, once."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "The rows to find.")


def main() -> None:
    from twotower.config import from_dict
    from twotower.evaluation import report
    from twotower.evaluation.evaluate import make_validate
    from twotower.retrieval.mining import make_miner
    from twotower.training.run import load_run, train

    config, workdir = from_dict(_CONFIG.value), Path(_WORKDIR.value)
    ks, measured = config.evaluation.ks, []
    for seed in range(_SEEDS.value):
        chosen = dataclasses.replace(
            config, training=dataclasses.replace(config.training, seed=seed)
        )
        train(chosen, workdir / f"seed-{seed}", make_validate=make_validate, make_miner=make_miner)
        run = load_run(workdir / f"seed-{seed}")
        measured.append(
            report.measure_run(
                run, ks=ks, split=_SPLIT.value, baselines=_BASELINES.value and not seed
            )
        )
    path = workdir / ("repeat.json" if _SPLIT.value == "test" else "repeat_validation.json")
    report.write_metrics({f"seed-{seed}": each for seed, each in enumerate(measured)}, path)
    for suffix, title in (("", "Seen items masked"), ("_unmasked", "Nothing masked")):
        print(f"\n{title}, {_SPLIT.value}, {len(measured)} seeds:")
        print(
            format_seeds(
                [each[f"model{suffix}"] for each in measured],
                measured[0].get(f"baselines{suffix}", {}),
                ks,
            )
        )
    print(f"\nWritten to {path}.")


def format_seeds(
    models: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Any]],
    ks: Sequence[int],
) -> str:
    """A row a metric: mean, standard deviation (of one seed: none), lowest and highest, then each
    baseline's."""
    heads = [
        "mean",
        "deviation",
        "lowest",
        "highest",
        *(name.replace("popularity_", "").replace("_", " ") for name in baselines),
    ]
    widths = [max(len(head), 8) + 2 for head in heads]
    lines = [f"{'':14}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths))]
    for metric in (f"{name}@{k}" for name in ("recall", "ndcg") for k in ks):
        values = [model[metric] for model in models]
        deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        others = [f"{each[metric]:.4f}" for each in baselines.values()]
        cells = [
            f"{statistics.mean(values):.4f}",
            deviation,
            f"{min(values):.4f}",
            f"{max(values):.4f}",
            *others,
        ]
        lines.append(
            f"{metric:14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    launch.run(main, required=["config", "workdir"])
