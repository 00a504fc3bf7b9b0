r"""Measures a run: exact metrics beside baselines, and the index of its bundle where there is one.

    python -m experiments.evaluate --workdir=runs/quickstart --k=10,50,100 \
        --baselines [--split=validation] [--dim=32]
        [--devices=N]

Each device scores and ranks its own part of the items. Prints a table and writes
WORKDIR/evaluation/metrics.json (metrics_validation.json for that split).
"""

from __future__ import annotations

import math

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Which weights: best, latest or a step.")
_K = flags.DEFINE_list("k", None, "Lengths of the lists; by default those of the configuration.")
_BASELINES = flags.DEFINE_bool(
    "baselines", False, "Measure random, popularity and the like beside the model."
)
_QUERIES = flags.DEFINE_integer(
    "queries",
    0,
    "Ask at most this many, evenly spaced, where all would take too long.",
    lower_bound=0,
)
_WEIGHTS = flags.DEFINE_list(
    "popularity_weights",
    [],
    "Measure lists with popularity weighed too: --popularity_weights=0,.05.",
)
_DIM = flags.DEFINE_integer(
    "dim",
    None,
    "Width that vectors are cut to, in the place of config.retrieval.dim's.",
    lower_bound=1,
)
_DEVICES = flags.DEFINE_integer("devices", 0, "Devices to measure on; 0: all.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "The rows to find.")


def main() -> None:
    from twotower import api
    from twotower.evaluation.report_text import format_report

    run = api.load_run(_WORKDIR.value, checkpoint=_CHECKPOINT.value)
    if _DIM.value:
        run = api.with_index_options(run, dim=_DIM.value)
    ks = parse_ks(_K.value, run.config.evaluation.ks)
    measured = api.evaluate(
        run,
        ks=ks,
        split=_SPLIT.value,
        baselines=_BASELINES.value,
        max_queries=_QUERIES.value,
        popularity_weights=parse_weights(_WEIGHTS.value),
        devices=_DEVICES.value,
    )
    path = api.metrics_path(run.workdir, _SPLIT.value)
    print(f"{format_report(measured, ks)}\n\nWritten to {path}.")


def parse_ks(given: list[str] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """List lengths in rising order."""
    from twotower.core.errors import ConfigError

    bad = [k for k in given or () if not k.strip().isdigit() or int(k) < 1]
    if bad:
        raise ConfigError(
            f"--k={','.join(given)}: {bad[0]!r} is not a list length. Give numbers, such as --k=10,50."
        )
    return tuple(sorted({int(k) for k in given})) if given else default


def parse_weights(given: list[str]) -> tuple[float, ...]:
    """Weights of popularity."""
    from twotower.core.errors import ConfigError

    try:
        weights = tuple(float(weight) for weight in given)
    except ValueError as error:
        raise ConfigError(
            f"--popularity_weights={','.join(given)}: {error}. Give numbers, such as 0,.02,.05."
        ) from None
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"--popularity_weights={','.join(given)} must be finite.")
    return weights


if __name__ == "__main__":
    launch.run(main, required=["workdir"])
