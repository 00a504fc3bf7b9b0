"""Flags of commands that log to MLflow, or take a run from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from absl import flags

if TYPE_CHECKING:
    from twotower.integrations.mlflow_model import Registration
    from twotower.integrations.mlflow_store import Destination


class TrackingFlags(NamedTuple):
    """Flags that say where a run is logged to.

    Attributes:
        experiment_name: Name of the experiment in MLflow; None if it is left out.
        run_name: Name of the run in MLflow, likewise.
        tracking_uri: Address of the store, likewise.
    """

    experiment_name: flags.FlagHolder[str | None]
    run_name: flags.FlagHolder[str | None]
    tracking_uri: flags.FlagHolder[str | None]

    def destination(self) -> Destination | None:
        """Returns where the flags send a run; None where none of them is given."""
        from twotower.core.errors import ConfigError
        from twotower.integrations.mlflow_store import (
            DEFAULT_EXPERIMENT,
            DEFAULT_URI,
            Destination,
        )

        # By None and not by emptiness: an empty flag is a variable of the shell that is not set,
        # and is told so.
        if all(flag.value is None for flag in self):
            return None
        # Such as a variable of the shell that is not set.
        if self.tracking_uri.value == "":
            raise ConfigError(
                f"--tracking_uri= is empty: name a store, such as --tracking_uri={DEFAULT_URI}."
            )
        return Destination(
            uri=self.tracking_uri.value or "",
            experiment=self.experiment_name.value or DEFAULT_EXPERIMENT,
            run_name=self.run_name.value or "",
        )

    def names(self) -> dict[str, str]:
        """Returns the destination as arguments of the verbs that take names; {} for none."""
        destination = self.destination()
        if destination is None:
            return {}
        return {
            "experiment_name": destination.experiment,
            "run_name": destination.run_name,
            "tracking_uri": destination.uri,
        }


def define_tracking(flag_values: flags.FlagValues) -> TrackingFlags:
    """Defines --experiment_name, --run_name and --tracking_uri, of an experiment in MLflow."""
    return TrackingFlags(
        flags.DEFINE_string(
            "experiment_name", None, "Name of the experiment in MLflow.", flag_values=flag_values
        ),
        flags.DEFINE_string(
            "run_name",
            None,
            "Name of the run in MLflow; by default that of its folder.",
            flag_values=flag_values,
        ),
        define_tracking_uri(flag_values),
    )


def define_tracking_uri(flag_values: flags.FlagValues) -> flags.FlagHolder[str | None]:
    """Defines --tracking_uri, the address of a store of MLflow."""
    return flags.DEFINE_string(
        "tracking_uri",
        None,
        "Store of MLflow: sqlite:///FILE or http://HOST:PORT; by default MLFLOW_TRACKING_URI, or "
        "sqlite:///mlflow.db.",
        flag_values=flag_values,
    )


class RegistryFlags(NamedTuple):
    """Flags that make a bundle a version in MLflow's registry of models.

    Attributes:
        register: Name of the model; None if it is left out.
        alias: Alias of the version, likewise.
    """

    register: flags.FlagHolder[str | None]
    alias: flags.FlagHolder[str | None]

    def registration(self) -> Registration | None:
        """Returns the name and the alias of the flags; None where there is no name."""
        from twotower.core.errors import ConfigError
        from twotower.integrations.mlflow_model import Registration

        if self.register.value:
            return Registration(name=self.register.value, alias=self.alias.value or "")
        if self.alias.value:
            raise ConfigError(f"--alias={self.alias.value} names a version: give --register too.")
        return None


def define_registry(flag_values: flags.FlagValues) -> RegistryFlags:
    """Defines --register and --alias."""
    return RegistryFlags(
        flags.DEFINE_string(
            "register",
            None,
            "Make the bundle a version of this model in MLflow's registry.",
            flag_values=flag_values,
        ),
        flags.DEFINE_string(
            "alias", None, "Alias of that version, such as champion.", flag_values=flag_values
        ),
    )


class _OptionalValue(flags.ArgumentParser):
    """Reads the folder of a run; of a flag that is given without a value, as --append beside
    --mlflow_experiment, it makes the empty text."""

    def parse(self, argument: str) -> str:
        return "" if argument == "true" else argument


class RunFlags(NamedTuple):
    """Flags that name a run: its folder, or an experiment of MLflow.

    Attributes:
        need: Whether the command needs the folder of the run, or its bundle alone.
        workdir: Folder of the run; None if it is left out.
        mlflow_experiment: Name of an experiment in MLflow, likewise.
        mlflow_run: Name or id of a run in it, or "latest".
        tracking_uri: Address of the store; None if it is left out.
    """

    need: Literal["run", "bundle"]
    workdir: flags.FlagHolder[str | None]
    mlflow_experiment: flags.FlagHolder[str | None]
    mlflow_run: flags.FlagHolder[str]
    tracking_uri: flags.FlagHolder[str | None]

    @property
    def is_of_mlflow(self) -> bool:
        """Whether the run is taken from MLflow."""
        return self.mlflow_experiment.value is not None

    def folder(self) -> Path:
        """Returns the folder of the run that the flags name.

        Raises:
            ConfigError: They name none, or more than one.
        """
        from twotower.core.errors import ConfigError

        experiment = self.mlflow_experiment.value
        # Not left to absl, which would require --workdir in any case.
        if experiment is None and not self.workdir.value:
            raise ConfigError(
                f"--{self.workdir.name}=... is required. In its place --mlflow_experiment=... "
                "names the latest run of an experiment in MLflow."
            )
        if experiment is None:
            return Path(self.workdir.value or "")
        if self.workdir.value:
            raise ConfigError(
                f"--{self.workdir.name}={self.workdir.value} and --mlflow_experiment={experiment} "
                "both name a run: give one of them."
            )
        return _tracked_folder(
            experiment, self.mlflow_run.value, self.need, self.tracking_uri.value or ""
        )

    def output(self, folder: Path, name: str) -> Path:
        """Returns where a command writes by default: into the folder of the run, or, of a bundle
        that was downloaded, into the working folder.

        Args:
            folder: Result of `folder`.
            name: Name of the file or folder to write.
        """
        # The cache holds bundles, and no results that a user looks for.
        if self.is_of_mlflow and not (folder / "checkpoints").exists():
            return Path(name)
        return folder / name


def _tracked_folder(experiment: str, run: str, need: Literal["run", "bundle"], uri: str) -> Path:
    """Returns the folder of a run in MLflow, and prints which one it is."""
    # Not for a run that is here: it takes time to load.
    from twotower.integrations.mlflow_runs import find_run, folder_of

    found = find_run(experiment, run, uri=uri)
    folder = folder_of(found, need, uri=uri)
    # Which run "latest" was: the next command may find another one.
    print(f"Run {found.link.run_name!r} of the experiment {experiment!r}: {folder}")
    return folder


class ExperimentFlags(NamedTuple):
    """Flags of a command that takes several runs: the experiment of MLflow that names them.

    Attributes:
        mlflow_experiment: Name of the experiment; None where runs are named by their folders.
        tracking_uri: Address of the store; None if it is left out.
    """

    mlflow_experiment: flags.FlagHolder[str | None]
    tracking_uri: flags.FlagHolder[str | None]

    def named(self, run: str) -> str:
        """Returns the folder of a run that is named by its folder or in the experiment.

        Args:
            run: Folder; with an experiment, name or id of a run in it, or "latest". ":ease" and
                the like after it, which names a baseline beside the run, stays.
        """
        experiment = self.mlflow_experiment.value
        if experiment is None:
            return run
        name, colon, ranking = run.partition(":")
        folder = _tracked_folder(experiment, name, "run", self.tracking_uri.value or "")
        return f"{folder}{colon}{ranking}"


def define_experiment(flag_values: flags.FlagValues) -> ExperimentFlags:
    """Defines --mlflow_experiment, whose runs stand in the place of folders."""
    return ExperimentFlags(
        flags.DEFINE_string(
            "mlflow_experiment",
            None,
            "Experiment of MLflow: runs are then named as in it, by name, id or latest.",
            flag_values=flag_values,
        ),
        define_tracking_uri(flag_values),
    )


def define_run(
    flag_values: flags.FlagValues,
    need: Literal["run", "bundle"],
    workdir: str = "workdir",
    description: str = "The folder of the run.",
    *,
    may_stand_alone: bool = False,
) -> RunFlags:
    """Defines --workdir, and in its place --mlflow_experiment with --mlflow_run.

    Args:
        flag_values: Flags of the command.
        need: Whether it needs the folder of the run, or its bundle alone.
        workdir: Name of the first flag.
        description: Text on it for --help.
        may_stand_alone: Whether it may be given without a value, as --append.
    """
    holder = flags.DEFINE(_OptionalValue(), workdir, None, description, flag_values=flag_values)
    # absl then takes no value from the argument that follows, and "true" where there is none.
    flag_values[workdir].boolean = may_stand_alone
    return RunFlags(
        need,
        holder,
        flags.DEFINE_string(
            "mlflow_experiment",
            None,
            f"Take the run from this experiment of MLflow, in the place of --{workdir}.",
            flag_values=flag_values,
        ),
        flags.DEFINE_string(
            "mlflow_run", "latest", "Its name or id, or latest.", flag_values=flag_values
        ),
        define_tracking_uri(flag_values),
    )
