r"""Logs a run to MLflow: configuration, data, metrics, evaluations, files.

    twotower track --workdir=runs/quickstart --experiment_name=shop [--bundle] \
        [--tracking_uri=sqlite:///mlflow.db] [--register=shop --alias=champion]

For a run that was trained without --experiment_name, or whose store was away. It may be given at
any time, also while the run trains, and again: nothing is logged twice. Without --experiment_name
and --tracking_uri a run goes on where it was logged before. --register makes its bundle
a version in MLflow's registry of models. MLflow's own server shows the runs:
pip install mlflow, mlflow ui --backend-store-uri=sqlite:///mlflow.db
"""

from __future__ import annotations

from absl import flags

from twotower.commands import mlflow_flags

FLAGS = flags.FlagValues()
# No run of MLflow can stand in its place, as it is what becomes one.
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run.", required=True, flag_values=FLAGS
)
_TRACKING = mlflow_flags.define_tracking(FLAGS)
_ARTIFACTS = flags.DEFINE_string(
    "artifacts",
    "",
    "Where a new experiment keeps files; by default beside the SQLite file.",
    flag_values=FLAGS,
)
_REGISTRY = mlflow_flags.define_registry(FLAGS)
_BUNDLE = flags.DEFINE_bool("bundle", False, "Log the bundle too.", flag_values=FLAGS)


def main() -> None:
    import dataclasses

    from twotower.integrations.tracking import track

    destination = _TRACKING.destination()
    if destination is not None:
        # Only a new experiment can be told where its files lie: a flag of this command alone.
        destination = dataclasses.replace(destination, artifacts=_ARTIFACTS.value)
    run = track(
        _WORKDIR.value,
        destination,
        bundle=_BUNDLE.value,
        registration=_REGISTRY.registration(),
    )
    print(f"{_WORKDIR.value}: run {run.run_id} of the experiment {run.experiment!r}.")
