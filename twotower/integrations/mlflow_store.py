"""MLflow stores: their addresses, whether they answer, and the link from a run's folder to its
MLflow run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.core.errors import ConfigError
from twotower.core.files import atomic, read_json
from twotower.core.install import extra

if TYPE_CHECKING:  # an extra, which is not always installed
    from mlflow import MlflowClient

DEFAULT_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "twotower"
URI_VARIABLE = "MLFLOW_TRACKING_URI"  # read by MLflow itself, too
SQLITE = "sqlite:///"
SQLITE_MAGIC = b"SQLite format 3\0"  # first bytes of every database
ADDRESSES = ("models:/", "runs:/")  # of files in a store
ANSWER_SECONDS = 5  # wait for a tracking server
LINK = "mlflow.json"  # in the folder of the run: the MLflow run that it is logged to
WORKDIR_TAG = "twotower.workdir"  # absolute folder of a run that commands may take
SWEEP_TAG = "twotower.sweep"  # absolute folder of a sweep, or of one of its trainings
PARENT_TAG = "mlflow.parentRunId"  # by which MLflow's page nests runs
VERSION_TAG = "twotower.model_version"
LINK_TAG = "twotower.link"  # token of the link, by which a run is found whose id was lost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Destination:
    """Experiment of a store that a run is logged to.

    Attributes:
        uri: Address of the store: sqlite:///FILE, or a tracking server's http://HOST:PORT; "" for
            that of MLFLOW_TRACKING_URI, or mlflow.db in the working folder.
        experiment: Name of the experiment, which is made where there is none.
        run_name: Name of the MLflow run; "" for that of the run's folder.
        artifacts: Folder or address for the files of a new experiment; "" for the folder
            mlartifacts beside an SQLite file (MLflow's own default is the folder that the command
            was started in), or the server's choice.
        parent: Folder of the sweep that the run is a trial of, whose MLflow run it is nested in; ""
            for a run of its own.
    """

    uri: str = ""
    experiment: str = DEFAULT_EXPERIMENT
    run_name: str = ""
    artifacts: str = ""
    parent: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """The MLflow run of a run's folder, kept there as mlflow.json.

    Attributes:
        uri: Address of the store, without a password.
        experiment: Name of the experiment.
        run_name: Name of the MLflow run.
        token: Value of `LINK_TAG` of the MLflow run.
        run_id: Id of the MLflow run; "" until the store has made it.
        parent: Folder of the sweep that the run is a trial of, if any.
    """

    uri: str
    experiment: str
    run_name: str = ""
    token: str = ""
    run_id: str = ""
    parent: str = ""

    def save(self, workdir: Path) -> None:
        """Writes the link into the folder of the run."""
        with atomic(workdir / LINK) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


def read_link(workdir: Path) -> Link | None:
    """Returns the link of a run's folder; None where it was never logged."""
    path = workdir / LINK
    if not path.exists():
        return None
    values = read_json(path)
    names = {field.name for field in dataclasses.fields(Link)}
    return Link(**{name: values[name] for name in names & values.keys()})


def link_run(workdir: Path, destination: Destination) -> Link:
    """Returns the link of a run's folder to a destination, a new one where it has another.

    It is written before the store is asked: a command that is killed, or finds no server, leaves
    what a later one goes on with.
    """
    # The file is copied with the folder: it must not hold a password.
    address = hide_password(resolve_uri(destination.uri))
    old = read_link(workdir)
    if old and (old.uri, old.experiment) == (address, destination.experiment):
        return old
    name = destination.run_name or workdir.resolve().name
    link = Link(
        uri=address,
        experiment=destination.experiment,
        run_name=name,
        token=uuid.uuid4().hex,
        parent=destination.parent,
    )
    link.save(workdir)
    return link


def linked_destination(workdir: Path) -> Destination | None:
    """Returns where a run was logged before, with the password of the environment if any; None
    where it was not."""
    link = read_link(workdir)
    if link is None:
        return None
    uri = link.uri
    of_environment = os.environ.get(URI_VARIABLE, "")
    if hide_password(of_environment) == uri:
        uri = of_environment
    return Destination(
        uri=uri, experiment=link.experiment, run_name=link.run_name, parent=link.parent
    )


def resolve_uri(uri: str) -> str:
    """Returns the address of a store, that of the environment or the default one for "".

    The path of an SQLite file is made absolute: later commands may run in other folders.
    """
    address = uri or os.environ.get(URI_VARIABLE, "") or DEFAULT_URI
    file = address.removeprefix(SQLITE)
    if file == address:
        return address
    return SQLITE + str(Path(file).absolute())


def is_address(text: object) -> bool:
    """Returns whether a text names a bundle in MLflow: models:/… or runs:/…"""
    return isinstance(text, str) and text.startswith(ADDRESSES)


def hide_password(uri: str) -> str:
    """Returns an address without its user and password.

    >>> hide_password("http://me:secret@host:5000")
    'http://host:5000'
    """
    return re.sub(r"//[^/@]*@", "//", uri)


def artifact_folder(uri: str) -> str:
    """Returns the folder for files beside an SQLite file; "" for a server."""
    file = uri.removeprefix(SQLITE)
    if file == uri:
        return ""
    return (Path(file).parent / "mlartifacts").as_uri()


def require_mlflow(what: str = "tracking") -> None:
    """Refuses work that needs MLflow where it is not installed.

    Raises:
        ConfigError: The message names the extra.
    """
    with extra("mlflow", what):
        import alembic  # noqa: F401  MLflow's SQLite stores and models need them
        import mlflow  # noqa: F401
        import pandas  # noqa: F401
        import sqlalchemy  # noqa: F401


@contextlib.contextmanager
def open_store(uri: str, cure: str = "") -> Iterator[MlflowClient]:
    """Opens a store, and turns its refusals into a line.

    Args:
        uri: Address of the store, resolved.
        cure: Sentence that ends the message of a refusal.

    Raises:
        ConfigError: The extra is missing, or the store does not answer or refuses.
    """
    require_mlflow()
    import sqlalchemy.exc
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    check_store(uri)
    try:
        # Both addresses: MLflow would take the other one from the environment.
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    # Those of the database, and a driver of it that is missing, come through as they are.
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        # Refusals of this library are one line.
        reason = str(error).splitlines()[0].rstrip(".")
        message = f"MLflow at {hide_password(uri)} refuses: {reason}. {cure}"
        raise ConfigError(message.strip()) from error


def check_store(uri: str) -> None:
    """Refuses a store that does not answer, or is none: MLflow tries again for minutes.

    Raises:
        ConfigError: The message names the address and what is wrong.
    """
    # Through MLflow's own library, so that a proxy and certificates are those that it uses.
    import requests

    check_address(uri)
    if not uri.startswith(("http://", "https://")):
        return
    try:
        # Any answer will do: the page need not be there.
        requests.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS)
    except (requests.RequestException, ValueError) as error:
        raise ConfigError(
            f"--tracking_uri={hide_password(uri)} does not answer within {ANSWER_SECONDS} seconds "
            f"({type(error).__name__}). Is the tracking server running, and the address right?"
        ) from error


def check_address(uri: str) -> None:
    """Refuses the address of an SQLite file that is none.

    Raises:
        ConfigError: The message names the address and what is wrong.
    """
    if not uri.startswith(SQLITE):
        return
    shown = f"--tracking_uri={uri}"
    file = Path(uri.removeprefix(SQLITE))
    if not file.parent.is_dir():
        raise ConfigError(f"{shown}: there is no folder {file.parent}.")
    # An empty one is a database without tables.
    if file.exists() and file.stat().st_size:
        with file.open("rb") as opened:
            if opened.read(len(SQLITE_MAGIC)) != SQLITE_MAGIC:
                raise ConfigError(f"{shown} is no SQLite database. Name another file.")
