"""Runs and bundles that are named by MLflow: an experiment's latest run, models:/shop@champion.

A run is taken from its folder where that is on this machine, which the tag `twotower.workdir`
names. Elsewhere its bundle is downloaded, verified by the checksums of its manifest, and kept in a
cache under that of the manifest: a second command finds it there.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from twotower.core.errors import BundleError, ConfigError, FolderError
from twotower.core.files import check_files, content_digest, read_json
from twotower.core.install import command
from twotower.integrations.mlflow_store import (
    WORKDIR_TAG,
    Link,
    hide_password,
    open_store,
    read_link,
    resolve_uri,
)
from twotower.retrieval.bundle import BUNDLE

if TYPE_CHECKING:  # an extra, which is not always installed
    from mlflow import MlflowClient
    from mlflow.entities import Run

MANIFEST = "manifest.json"
BESIDE = ("config.json", "plugins.json")  # files of a bundle that the folder of a run has too
SHOWN = 5  # names that a message lists

# (path of a file or folder, folder to download into) -> what was downloaded.
Download = Callable[[str, Path], Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run that MLflow names.

    Attributes:
        link: Store, experiment, name and id of the run.
        workdir: Its folder, where it was trained; it may be on another machine.
    """

    link: Link
    workdir: Path

    @property
    def is_here(self) -> bool:
        """Whether the folder is on this machine, and still holds this run."""
        # Another machine may have another run in a folder of that name.
        link = read_link(self.workdir)
        return link is not None and link.run_id == self.link.run_id


def find_run(experiment: str, run: str = "latest", *, uri: str = "") -> TrackedRun:
    """Finds a run of an experiment in MLflow.

    Args:
        experiment: Name of the experiment.
        run: Name or id of the run, or "latest"; of several with one name the latest is meant.
        uri: Address of the store; see `Destination`.

    Raises:
        ConfigError: There is no such experiment or run; the message lists those that there are.
    """
    address = resolve_uri(uri)
    with open_store(address) as client:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = [one.name for one in client.search_experiments(max_results=SHOWN)]
            raise ConfigError(
                f"--mlflow_experiment={experiment}: MLflow at {hide_password(address)} has no such "
                f"experiment; it has: {', '.join(names)}."
            )
        runs = client.search_runs(
            [found.experiment_id],
            _filter_of(run),
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if not runs:
            raise _no_run(client, found.experiment_id, experiment, run)
        best = runs[0]
    name = best.info.run_name or best.info.run_id
    # Without the password: the link is written into a file of the run.
    link = Link(
        uri=hide_password(address), experiment=experiment, run_name=name, run_id=best.info.run_id
    )
    return TrackedRun(link=link, workdir=Path(best.data.tags[WORKDIR_TAG]))


def _filter_of(run: str) -> str:
    """Returns the condition that a name, an id or "latest" stands for, in MLflow's language."""
    # By the store and not here: any number of runs of others may be newer than ours.
    is_ours = f"tags.`{WORKDIR_TAG}` LIKE '%'"
    if run == "latest":
        return is_ours
    if re.fullmatch(r"[0-9a-f]{32}", run):
        return f"{is_ours} and attributes.run_id = '{run}'"
    quote = "'"
    # Its language has no way to write a quote within quotes of the same kind.
    if quote in run:
        quote = '"'
    return f"{is_ours} and attributes.run_name = {quote}{run}{quote}"


def _no_run(client: MlflowClient, experiment_id: str, experiment: str, run: str) -> ConfigError:
    """Returns the error that an experiment has no such run."""
    latest: list[Run] = client.search_runs([experiment_id], max_results=SHOWN)
    names = [one.info.run_name or one.info.run_id for one in latest]
    listed = ", ".join(names) or "none"
    return ConfigError(
        f"--mlflow_run={run}: the experiment {experiment!r} has no such run of this library; the "
        f"latest are: {listed}."
    )


def folder_of(found: TrackedRun, need: Literal["run", "bundle"], *, uri: str = "") -> Path:
    """Returns the folder of a run: its own, or one in the cache that holds its bundle.

    Args:
        found: Run that MLflow names.
        need: Whether the run itself is needed, its data and checkpoints, or its bundle alone.
        uri: Address of the store; see `Destination`.

    Raises:
        ConfigError: The folder is not on this machine, and a bundle is not enough or not logged.
        BundleError: The bundle was changed after it was written.
    """
    name = f"run {found.link.run_name!r} of the experiment {found.link.experiment!r}"
    # A run on this machine may have exported its bundle to MLflow and not have kept it.
    has_bundle = (found.workdir / BUNDLE).exists()
    if found.is_here and (need == "run" or has_bundle):
        return found.workdir
    if need == "run":
        raise ConfigError(
            f"{name} was trained in {found.workdir}, which is not here: this command needs the "
            "folder of the run, with its data and checkpoints. Its bundle alone is enough for "
            "query, recommend_all, history, publish and serve."
        )
    run_id = found.link.run_id
    with open_store(resolve_uri(uri)) as client:
        # Asked first, for an error that says how a bundle is made.
        logged = {file.path for file in client.list_artifacts(run_id, BUNDLE)}
        if f"{BUNDLE}/{MANIFEST}" not in logged:
            line = command("export", f"--workdir={found.workdir}")
            raise ConfigError(
                f"{name} has no bundle in MLflow. Make it where it was trained: {line}"
            )

        def download(path: str, folder: Path) -> Path:
            return Path(client.download_artifacts(run_id, path, str(folder)))

        folder = _cached(download, BUNDLE)
    # The command may ask whose bundle it is.
    found.link.save(folder)
    return folder


def fetch_bundle(address: str, *, uri: str = "") -> Path:
    """Returns the folder, in the cache, of a bundle in MLflow.

    Args:
        address: models:/NAME/VERSION, models:/NAME@ALIAS, or runs:/RUN_ID/bundle.
        uri: Address of the store; see `Destination`.

    Raises:
        ConfigError: The address is none of these, or MLflow has no such bundle.
        BundleError: The bundle was changed after it was written.
    """
    resolved = resolve_uri(uri)
    # Read here and not by MLflow, whose errors do not say which forms there are.
    of_run = re.fullmatch(r"runs:/([^/]+)/(.+)", address)
    of_model = re.fullmatch(r"models:/([^/@]+)(?:/(\d+|latest)|@([^/]+))", address)
    with open_store(resolved, f"Is {address} the right address?") as client:
        import mlflow.artifacts

        if of_run:
            root = f"{client.get_run(of_run[1]).info.artifact_uri}/{of_run[2]}"
        elif of_model:
            version = _version(client, *of_model.groups())
            root = client.get_model_version_download_uri(of_model[1], version)
        else:
            raise ConfigError(
                f"{address} names no bundle. Give models:/NAME/VERSION, models:/NAME@ALIAS or "
                "runs:/RUN_ID/bundle."
            )

        def download(path: str, folder: Path) -> Path:
            whole = f"{root}/{path}".rstrip("/")
            local = mlflow.artifacts.download_artifacts(
                artifact_uri=whole, dst_path=str(folder), tracking_uri=resolved
            )
            return Path(local)

        return _cached(download, "") / BUNDLE


def _version(client: MlflowClient, name: str, number: str | None, alias: str | None) -> str:
    """Returns the number of a version that is given by number, as "latest" or by an alias."""
    if alias is not None:
        return str(client.get_model_version_by_alias(name, alias).version)
    if number != "latest":
        return str(number)
    versions = client.search_model_versions(f"name = '{name}'")
    if not versions:
        raise ConfigError(f"models:/{name}/latest: MLflow has no version of {name!r}.")
    # As numbers: as text 9 is the last of ten.
    return str(max(int(one.version) for one in versions))


def _cached(download: Download, root: str) -> Path:
    """Returns a folder in the cache that is like that of a run, with its bundle and configuration.

    Args:
        download: Function that downloads a file or a folder.
        root: Folder of the bundle among the files that it downloads.
    """
    cache = _cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    # In the cache, for a rename works within one file system alone.
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        first = Path(temporary) / "first"
        first.mkdir()
        # A small file, whose hash names the whole bundle.
        manifest = read_json(download(f"{root}/{MANIFEST}".lstrip("/"), first))
        digest = str(manifest.get("sha256"))
        target = cache / digest[:32]
        if target.exists():
            return target
        whole = Path(temporary) / "whole"
        whole.mkdir()
        bundle = download(root, whole)
        # Before it lies in the cache, which is believed from then on.
        _check(bundle, digest)
        made = Path(temporary) / "run"
        made.mkdir()
        for name in BESIDE:
            if (bundle / name).exists():
                # Commands read these from the folder of a run, not from its bundle.
                shutil.copy(bundle / name, made / name)
        shutil.move(bundle, made / BUNDLE)
        try:
            made.rename(target)
        except OSError:
            # Another process had it first.
            if not target.exists():
                raise
    return target


def _check(bundle: Path, digest: str) -> None:
    """Refuses a bundle whose files are not those of its manifest."""
    try:
        manifest = read_json(bundle / MANIFEST)
        if manifest.get("sha256") != digest or content_digest(manifest) != digest:
            raise FolderError(f"{MANIFEST} was changed after it was written.")
        check_files(bundle, manifest["files"])
    except (FolderError, KeyError) as error:
        raise BundleError(
            f"The bundle in MLflow is not whole: {error} Log it again, by export or by track "
            "--bundle."
        ) from error


def _cache_folder() -> Path:
    """Returns the folder of downloaded bundles."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "twotower" / "bundles"
