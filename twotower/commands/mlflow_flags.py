"""Flags of commands that log to MLflow, or take a run from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
