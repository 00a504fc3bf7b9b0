r"""Logs a run to MLflow: configuration, metrics, evaluations, files.

    twotower track --workdir=runs/quickstart --uri=sqlite:///mlflow.db \
        --experiment=shop [--bundle]

It may be given at any time, also while the run trains, and again: nothing is logged twice. MLflow's
own server shows the runs: pip install mlflow, mlflow ui --backend-store-uri=sqlite:///mlflow.db
"""

from __future__ import annotations

from absl import flags

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run.", required=True, flag_values=FLAGS
)
_URI = flags.DEFINE_string(
    "uri",
    "sqlite:///mlflow.db",
    "The store: sqlite:///FILE or http://HOST:PORT.",
    flag_values=FLAGS,
)
_EXPERIMENT = flags.DEFINE_string(
    "experiment", "twotower", "Name of the experiment in MLflow.", flag_values=FLAGS
)
_ARTIFACTS = flags.DEFINE_string(
    "artifacts",
    "",
    "Where a new experiment keeps files; by default beside the SQLite file.",
    flag_values=FLAGS,
)
_BUNDLE = flags.DEFINE_bool("bundle", False, "Log the bundle too.", flag_values=FLAGS)


def main() -> None:
    from twotower.integrations.tracking import track

    run_id = track(
        _WORKDIR.value,
        uri=_URI.value,
        experiment=_EXPERIMENT.value,
        artifacts=_ARTIFACTS.value,
        bundle=_BUNDLE.value,
    )
    print(f"{_WORKDIR.value}: run {run_id} of the experiment {_EXPERIMENT.value!r}.")
