"""A run in MLflow: its configuration, the metrics of its steps, what was evaluated, and its files.

The folder of the run is what is read, so this can be done at any time, also while the run trains,
and done again: what is there already is not logged twice.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from twotower.core.errors import ConfigError, extra
from twotower.core.files import atomic, current_version
from twotower.training.run import load_config

AT_ONCE = 1_000  # metrics in a request; MLflow takes no more
PARAMS_AT_ONCE = 100
LONGEST = 6_000  # characters of a parameter
STATE = "mlflow.json"


def track(
    workdir: Path | str, *, uri: str, experiment: str, artifacts: str = "", bundle: bool = False
) -> str:
    """Logs the run in `workdir` to an MLflow store.

    Args:
        uri: of the store: sqlite:///FILE, or a tracking server's http://HOST:PORT.
        experiment: its name; it is made where there is none.
        artifacts: where a new experiment keeps files; by default the folder mlartifacts beside an
            SQLite file (MLflow's own default is the folder that the command was started in), or
            where the server says.
        bundle: log the bundle too, beside the configuration and the evaluations.

    Returns:
        The id of the MLflow run, which a later call for this folder and store goes on with.

    Raises:
        ConfigError: `workdir` is no run, or the store refuses.
    """
    workdir = Path(workdir)
    config = load_config(workdir)
    with extra("mlflow", "tracking"):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        run_id = _run_id(client, workdir, uri, experiment, artifacts)
        _log_params(client, run_id, dataclasses.asdict(config))
        lines = list(_lines(workdir / "metrics.jsonl"))
        _log_metrics(client, run_id, [*lines, *_evaluations(workdir)])
        _log_files(client, run_id, workdir, bundle=bundle)
        # How many steps are in proportion to the data is known to the training alone.
        ended = lines and not config.training.steps_for and lines[-1][0] >= config.training.steps
        if ended or (workdir / "bundle").exists():
            client.set_terminated(run_id)
    except MlflowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        hint = (
            f" To log to a new run of MLflow, delete {workdir / STATE}."
            if (workdir / STATE).exists()
            else ""
        )
        raise ConfigError(f"MLflow at {_without_password(uri)} refuses: {reason}.{hint}") from error
    return run_id


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by their paths.

    >>> dict(flatten({"a": {"b": 1, "c": {}}, "recall@10": 2}))
    {'a.b': 1, 'recall_at_10': 2}
    """
    for key, value in tree.items():
        name = prefix + re.sub(
            r"[^\w.\- /]", "_", str(key).replace("@", "_at_")
        )  # what MLflow takes in a name
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _run_id(client: Any, workdir: Path, uri: str, experiment: str, artifacts: str) -> str:
    """The MLflow run that the folder was logged to before, or a new one."""
    path = workdir / STATE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("uri") == _without_password(uri) and known.get("experiment") == experiment:
        return known["run_id"]
    found = client.get_experiment_by_name(experiment)
    if found is None:
        place = artifacts or _beside(uri)
        experiment_id = client.create_experiment(experiment, artifact_location=place or None)
    else:
        experiment_id = found.experiment_id
    run = client.create_run(
        experiment_id,
        run_name=workdir.resolve().name,
        tags={"twotower.workdir": str(workdir.resolve())},
    )
    state = {"uri": _without_password(uri), "experiment": experiment, "run_id": run.info.run_id}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(state), encoding="utf-8")
    return run.info.run_id


def _beside(uri: str) -> str:
    file = uri.removeprefix("sqlite:///")
    return (Path(file).resolve().parent / "mlartifacts").as_uri() if file != uri else ""


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _log_params(client: Any, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    had = client.get_run(
        run_id
    ).data.params  # MLflow refuses another value for a parameter that it has
    params = [
        Param(name, str(value)[:LONGEST]) for name, value in flatten(config) if name not in had
    ]
    for start in range(0, len(params), PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + PARAMS_AT_ONCE])


def _log_metrics(
    client: Any, run_id: str, lines: Iterable[tuple[int, Mapping[str, float]]]
) -> None:
    from mlflow.entities import Metric

    # A time that is always the same for a step: so the store sees what it has already.
    begun = client.get_run(run_id).info.start_time
    metrics = [
        Metric(name, float(x), begun + step, step)
        for step, values in lines
        for name, x in flatten(values)
    ]
    for start in range(0, len(metrics), AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + AT_ONCE])


def _lines(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and their metrics; the line that a trainer is just writing is left for the next
    time."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            values = json.loads(line)
            yield (
                values.pop("step"),
                {name: x for name, x in values.items() if isinstance(x, (int, float))},
            )


def _evaluations(workdir: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The figures in evaluation/, as test.model.recall_at_10."""
    for path in sorted((workdir / "evaluation").glob("metrics*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        protocol = measured.pop("protocol")
        figures = flatten({protocol["split"]: measured})
        yield protocol["step"], {name: x for name, x in figures if isinstance(x, (int, float))}


def _log_files(client: Any, run_id: str, workdir: Path, *, bundle: bool) -> None:
    client.log_artifact(run_id, str(workdir / "config.json"))
    # Without the versions before: the one that is logged is a bundle of its own.
    files = current_version(workdir / "bundle")
    folders = {"evaluation": workdir / "evaluation"} | ({"bundle": files} if bundle else {})
    for name, folder in folders.items():
        if folder.exists():
            client.log_artifacts(run_id, str(folder), name)
    manifest = files / "manifest.json"
    if manifest.exists():
        client.set_tag(
            run_id, "twotower.model_version", json.loads(manifest.read_text())["model_version"]
        )
