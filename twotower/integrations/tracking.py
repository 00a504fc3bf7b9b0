"""Tracking of a run in MLflow: its configuration, metrics, evaluations and files.

Only the folder of the run is read, so that a run can be logged at any time, also while it trains,
and again: nothing is logged twice.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.core.errors import ConfigError
from twotower.core.files import atomic, current_version, read_json
from twotower.core.install import extra
from twotower.plugins import load_config
from twotower.training.metrics import read_lines

if TYPE_CHECKING:  # an extra, which is not always installed
    from mlflow import MlflowClient

# Limits of MLflow: for one request, and for the text of a parameter.
METRICS_PER_REQUEST = 1_000
PARAMS_PER_REQUEST = 100
MAX_PARAM_CHARACTERS = 6_000
SQLITE = "sqlite:///"
SQLITE_MAGIC = b"SQLite format 3\0"  # first bytes of every database
ANSWER_SECONDS = 5  # wait for a tracking server
STATE_FILE = "mlflow.json"  # in the folder of the run: the MLflow run that it was logged to


def track(
    workdir: Path | str, *, uri: str, experiment: str, artifacts: str = "", bundle: bool = False
) -> str:
    """Logs the run in `workdir` to an MLflow store.

    Args:
        workdir: Folder of the run.
        uri: Address of the store: sqlite:///FILE, or a tracking server's http://HOST:PORT.
        experiment: Name of the experiment, which is made where there is none.
        artifacts: Folder or address for the files of a new experiment; by default the folder
            mlartifacts beside an SQLite file (MLflow's own default is the folder that the command
            was started in), or the server's choice.
        bundle: Whether the bundle is logged too, beside the configuration and the evaluations.

    Returns:
        The id of the MLflow run, which a later call for this folder and store goes on with.

    Raises:
        ConfigError: `workdir` is no run, or the store refuses.
    """
    workdir = Path(workdir)
    config = load_config(workdir)
    with extra("mlflow", "tracking"):
        import sqlalchemy.exc
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    _check_store(uri)
    try:
        # Both addresses: MLflow would take the other one from the environment.
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        run_id = _run_id(client, workdir, uri, experiment, artifacts)
        _log_params(client, run_id, dataclasses.asdict(config))
        lines = [(line.pop("step"), _numbers(line)) for line in read_lines(workdir)]
        _log_metrics(client, run_id, [*lines, *_evaluations(workdir)])
        _log_files(client, run_id, workdir, bundle=bundle)
        # Steps in proportion to the data are counted by the training alone, so that only a bundle
        # shows that it has ended.
        training = config.training
        is_counted = not training.steps_for and not training.passes
        ended = lines and is_counted and lines[-1][0] >= training.steps
        if ended or (workdir / "bundle").exists():
            client.set_terminated(run_id)
    # Those of the database, and a driver of it that is missing, come through as they are.
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        # Refusals of this library are one line.
        reason = str(error).splitlines()[0].rstrip(".")
        hint = ""
        # The run may have been deleted in MLflow since.
        if (workdir / STATE_FILE).exists():
            hint = f" To log to a new run of MLflow, delete {workdir / STATE_FILE}."
        raise ConfigError(f"MLflow at {_hide_password(uri)} refuses: {reason}.{hint}") from error
    return run_id


def _check_store(uri: str) -> None:
    """Refuses a store that does not answer, or is none: MLflow tries again for minutes.

    Raises:
        ConfigError: The message names the address and what is wrong.
    """
    # Through MLflow, so that a proxy and certificates are those that it uses.
    import requests

    shown = f"--uri={_hide_password(uri)}"
    if not uri.strip():
        raise ConfigError("--uri= is empty: name a store, such as --uri=sqlite:///mlflow.db.")
    if uri.startswith(("http://", "https://")):
        try:
            # Any answer will do: the page need not be there.
            requests.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS)
        except (requests.RequestException, ValueError) as error:
            raise ConfigError(
                f"{shown} does not answer within {ANSWER_SECONDS} seconds ({type(error).__name__})."
                " Is the tracking server running, and the address right?"
            ) from error
    file = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE):
        return
    if not file.parent.is_dir():
        raise ConfigError(f"{shown}: there is no folder {file.parent}.")
    # An empty one is a database without tables.
    if file.exists() and file.stat().st_size:
        with file.open("rb") as opened:
            if opened.read(len(SQLITE_MAGIC)) != SQLITE_MAGIC:
                raise ConfigError(f"{shown} is no SQLite database. Name another file.")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings with their paths, in names that MLflow takes.

    >>> dict(flatten({"a": {"b": 1, "c": {}}, "recall@10": 2}))
    {'a.b': 1, 'recall_at_10': 2}
    """
    for key, value in tree.items():
        # MLflow takes letters, digits and _-./ and spaces; "recall_10" would read badly.
        readable = str(key).replace("@", "_at_")
        name = prefix + re.sub(r"[^\w.\- /]", "_", readable)
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _run_id(client: MlflowClient, workdir: Path, uri: str, experiment: str, artifacts: str) -> str:
    """Returns the MLflow run that the folder was logged to before, or a new one."""
    path = workdir / STATE_FILE
    # The file is copied with the folder: it must not hold a password.
    address = _hide_password(uri)
    previous: dict[str, str] = {}
    if path.exists():
        previous = read_json(path)
    if previous.get("uri") == address and previous.get("experiment") == experiment:
        return previous["run_id"]
    existing = client.get_experiment_by_name(experiment)
    if existing is None:
        location = artifacts or _artifact_folder(uri)
        experiment_id = client.create_experiment(experiment, artifact_location=location or None)
    else:
        experiment_id = existing.experiment_id
    folder = workdir.resolve()
    tags = {"twotower.workdir": str(folder)}
    run = client.create_run(experiment_id, run_name=folder.name, tags=tags)
    # Before anything is logged: a command that is killed goes on with this run, not with another.
    state = {"uri": address, "experiment": experiment, "run_id": run.info.run_id}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(state), encoding="utf-8")
    return run.info.run_id


def _artifact_folder(uri: str) -> str:
    """Returns the folder for files beside an SQLite file; "" for a server."""
    file = uri.removeprefix(SQLITE)
    if file == uri:
        return ""
    return (Path(file).resolve().parent / "mlartifacts").as_uri()


def _hide_password(uri: str) -> str:
    """Returns an address without its user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    """Logs the options of the configuration that are not logged yet."""
    # In the functions, since the extra may be missing.
    from mlflow.entities import Param

    # MLflow refuses another value for a parameter that it has.
    logged = client.get_run(run_id).data.params
    params = [
        Param(name, str(value)[:MAX_PARAM_CHARACTERS])
        for name, value in flatten(config)
        if name not in logged
    ]
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])


def _log_metrics(
    client: MlflowClient, run_id: str, lines: Iterable[tuple[int, Mapping[str, float]]]
) -> None:
    """Logs the metrics of each step."""
    from mlflow.entities import Metric

    # The time of a step is made of its number and always the same, so that the store recognises
    # what it has already.
    start_time = client.get_run(run_id).info.start_time
    metrics = []
    for step, values in lines:
        for name, x in flatten(values):
            metrics.append(Metric(name, float(x), start_time + step, step))
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])


def _evaluations(workdir: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields steps with the figures in evaluation/, named like test.model.recall_at_10."""
    for path in sorted((workdir / "evaluation").glob("metrics*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        protocol = measured.pop("protocol")
        figures = flatten({protocol["split"]: measured})
        yield protocol["step"], _numbers(dict(figures))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values that are numbers: MLflow has no other metrics."""
    return {name: x for name, x in values.items() if isinstance(x, (int, float))}


def _log_files(client: MlflowClient, run_id: str, workdir: Path, *, bundle: bool) -> None:
    """Logs the configuration, the evaluations and, if `bundle`, the bundle."""
    client.log_artifact(run_id, str(workdir / "config.json"))
    # Without the versions before: the one that is logged is a bundle of its own.
    bundle_folder = current_version(workdir / "bundle")
    folders = {"evaluation": workdir / "evaluation"}
    if bundle:
        folders["bundle"] = bundle_folder
    for name, folder in folders.items():
        if folder.exists():
            client.log_artifacts(run_id, str(folder), name)
    # The tag is set also where the bundle itself is not logged: it says which one belongs here.
    manifest_file = bundle_folder / "manifest.json"
    if manifest_file.exists():
        manifest = json.loads(manifest_file.read_text())
        client.set_tag(run_id, "twotower.model_version", manifest["model_version"])
