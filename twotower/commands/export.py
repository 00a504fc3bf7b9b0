r"""Makes the bundle of a run: embeds the corpus, builds the index, writes WORKDIR/bundle.

    twotower export --workdir=runs/quickstart [--checkpoint=best] \
        [--target_recall=.95 --k=100] [--plot=index.png] [--dim=32] [--vectors=int8] \
        [--register=shop --alias=champion]

    twotower export --workdir=runs/quickstart --baseline=item_knn

Prints the trials by which the index was tuned, and its recall; for vectors that are cut or rounded,
also the loss against whole ones. --register makes the bundle a version in MLflow's registry of
models, in the store that the run is logged to. --baseline writes a baseline of the run as a bundle
of its own, WORKDIR/bundle_NAME, which a shop can begin with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from twotower.commands import mlflow_flags

FLAGS = flags.FlagValues()
# The index is built of vectors that only a checkpoint gives.
_RUN = mlflow_flags.define_run(FLAGS, "run")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "Weights: best, latest or a step.", flag_values=FLAGS
)
_PLOT = flags.DEFINE_string(
    "plot",
    None,
    "Draw recall against queries per second into this file (extra: plots).",
    flag_values=FLAGS,
)
_CHANGES = flags.DEFINE_enum(
    "changes",
    "carry",
    ["carry", "drop"],
    "Changes made to the items of the bundle before: carry them over to this one, or drop them.",
    flag_values=FLAGS,
)
_WITHOUT_USERS = flags.DEFINE_bool(
    "without_users",
    False,
    "Leave out the known users and what they had: they are then answered as new ones are.",
    flag_values=FLAGS,
)
_BASELINE = flags.DEFINE_string(
    "baseline",
    "",
    "Export a baseline in the place of the towers: popularity, popularity_last_week, "
    "popularity_in_categories, last_item_words, item_graph, item_knn, ease or als.",
    flag_values=FLAGS,
)
_BASELINE_DIM = flags.DEFINE_integer(
    "baseline_dim",
    256,
    "Greatest width of its vectors; a model of more items is approximated.",
    lower_bound=1,
    flag_values=FLAGS,
)
_REGISTRY = mlflow_flags.define_registry(FLAGS)
_SHARDS = flags.DEFINE_integer(
    "shards",
    1,
    "Shards that the items are divided into by a hash of their ids, with an index each; see "
    "`twotower serve --shard`.",
    lower_bound=1,
    flag_values=FLAGS,
)
# These replace options of config.retrieval of the same name.
_OPTIONS = (
    flags.DEFINE_float(
        "target_recall",
        None,
        "Share of the exact lists that the index must find.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=FLAGS,
    ),
    flags.DEFINE_integer("k", None, "Length of those lists.", lower_bound=1, flag_values=FLAGS),
    flags.DEFINE_integer(
        "dim",
        None,
        "Width to cut vectors to; one of config.objective.matryoshka.",
        lower_bound=1,
        flag_values=FLAGS,
    ),
    flags.DEFINE_enum(
        "vectors", None, ["float32", "int8"], "How item vectors are stored.", flag_values=FLAGS
    ),
)


def main() -> None:
    from twotower import api
    from twotower.evaluation.report.text import format_bundle
    from twotower.index.tuning_report import check_plot, save_plot

    # Both before minutes of work: an alias without a name, or an extra that is missing, ends it at
    # once.
    registration = _REGISTRY.registration()
    plot = None
    if _PLOT.value:
        plot = check_plot(Path(_PLOT.value))
    run = api.load_run(_RUN.folder(), checkpoint=_CHECKPOINT.value)
    # Flags that are left out leave the options of the run as they are.
    options: dict[str, Any] = {flag.name: flag.value for flag in _OPTIONS if flag.value is not None}
    options["changes"] = _CHANGES.value
    options["registration"] = registration
    options["baseline"] = _BASELINE.value
    options["baseline_dim"] = _BASELINE_DIM.value
    options["shards"] = _SHARDS.value
    bundle = api.export(run, with_users=not _WITHOUT_USERS.value, **options)
    folder = bundle.folder or run.workdir / api.BUNDLE
    print(format_bundle(bundle, folder))
    # The bundle of a baseline is none of the run's own, which --workdir would serve.
    served = f"--bundle={folder}" if _BASELINE.value else f"--workdir={run.workdir}"
    print(f"To look at it: twotower serve {served}, and open http://127.0.0.1:8000.")
    if plot is not None:
        print(save_plot(bundle.index, plot))
