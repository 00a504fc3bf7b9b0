"""Runs as folders with a configuration, an encoder, checkpoints and metrics. Every later command
needs only the folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from twotower.config import Config, from_dict
from twotower.core.arrow import release_freed_memory
from twotower.core.errors import CheckpointError, ConfigError
from twotower.core.fields import differences
from twotower.core.files import LOCK, atomic, exclusive, explain_full_disk
from twotower.core.install import command
from twotower.core.kinds import write_record
from twotower.core.mesh import make_mesh
from twotower.core.remote.mirror import pull
from twotower.core.remote.objects import is_remote
from twotower.data.dataset import Dataset
from twotower.data.report import DataReport, log_report
from twotower.features.encoder import Encoder
from twotower.kernels.dense import fastest_dtype
from twotower.pipeline import folder as data_folder
from twotower.pipeline.prepare import PreparedData, prepare
from twotower.pipeline.streaming.prepared import write_shards
from twotower.pipeline.streaming.stream import Stream, check_installed
from twotower.plugins import (
    config_path,
    import_plugins,
    load_config,
    make_record,
    read_config,
    warn_of_kinds_outside_plugins,
)
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.candidates import corpus_size
from twotower.training.checkpoint import Checkpoints
from twotower.training.checks import check_batch, check_memory, fits
from twotower.training.init import abstract_state
from twotower.training.loop import Miner, OnValidation, Validate, fit, open_checkpoints
from twotower.training.monitoring.monitor import NOT_ASKED, Monitor, Monitoring
from twotower.training.monitoring.phases import Phases
from twotower.training.monitoring.step_work import with_rates
from twotower.training.state import Trainer, TrainState, resolve_kinds

MakeValidate = Callable[[PreparedData, TwoTower], Validate]
MakeMiner = Callable[[PreparedData, TwoTower], Miner]

# The file that `grow` keeps in a folder for as long as the run in it is not whole.
UNFINISHED = ".unfinished"


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, loaded.

    Attributes:
        workdir: Folder of the run.
        config: Configuration of its training.
        prepared: Encoded data of the run.
        model: Pair of towers.
        weights: Weights of the towers at `step`.
        step: Step of the checkpoint that was loaded.
        validated: Validation metrics at `step`; {} without validation rows.
    """

    workdir: Path
    config: Config
    prepared: PreparedData
    model: TwoTower
    weights: Weights
    step: int
    validated: Mapping[str, float] = dataclasses.field(default_factory=dict)


def train(
    config: Config,
    workdir: Path | str,
    *,
    make_validate: MakeValidate | None = None,
    make_miner: MakeMiner | None = None,
    devices: int = 0,
    data: Path | str | None = None,
    dataset: Dataset | None = None,
    tell: Callable[[DataReport], None] = log_report,
    on_validation: OnValidation | None = None,
    monitoring: Monitoring = NOT_ASKED,
) -> None:
    """Trains a configuration in a folder, or goes on with the folder's run.

    The log is read and prepared once, into the folder `data` of the run; everything later reads
    that. Several processes need a folder that all of them see.

    Args:
        config: Configuration of the run.
        workdir: Folder of the run, new or begun with the same configuration.
        make_validate: Function from the data and the towers to `Validate`, called if there are
            validation rows.
        make_miner: Function from the data and the towers to `Miner`, called if the configuration
            has mined negatives.
        devices: Number of devices to use; 0 uses all.
        data: Folder of prepared data that runs share, prepared here if it holds none; None for one
            of the run itself.
        dataset: The log itself, in the place of the one that the configuration names.
        tell: Function that shows the report of the data before the first step.
        on_validation: Function that is told of each validation; see `twotower.training.loop.fit`.
        monitoring: What is watched while it trains.

    Raises:
        BusyError: Another training goes on in the folder.
        ConfigError: The folder holds a run of another configuration, or the data or a field cannot
            be used.
        FolderError: Prepared data is missing, damaged, or that of another run.
        PreemptedError: The process was asked to end by SIGTERM, and has saved where it was.
        TrainingError: The loss or a gradient is not finite.
    """
    # From here on: reading and compiling are time of the run too.
    phases = Phases()
    workdir = local_folder(workdir)
    shared = None if data is None else local_folder(data, "--data")
    mesh = make_mesh(devices)
    with write_alone(workdir, "train"):
        config = with_known_dtype(config, workdir)
        check_batch(config.training, mesh)
        import_plugins(config.plugins, workdir)
        # A misspelt loss is refused before the data is read, not after.
        resolve_kinds(config)
        if config.training.input == "stream":
            check_installed()
        prepared = _kept_data(config, workdir, shared)
        is_new = prepared is None
        if prepared is None:
            prepared = prepare(config, folder=workdir, dataset=dataset)
        model = TwoTower.build(config.model, prepared.encoder)
        trainer = Trainer.build(config, model, corpus_size(prepared))
        # Only now that everything fits: an error above leaves the folder free for the corrected
        # configuration.
        begin(workdir, config, prepared, shared)
        # From the folder in any case: a run that goes on sees the same arrays as one that begins.
        if is_new:
            prepared = data_folder.load(data_path(workdir), config, prepared.encoder)
            # Of a long log the preparation takes more than the training that follows.
            release_freed_memory()
        if prepared.report is not None and jax.process_index() == 0:
            tell(prepared.report)
        validate = None
        if make_validate and len(prepared.validation):
            validate = make_validate(prepared, model)
        mine = None
        if make_miner and trainer.sampling.config.mined:
            mine = make_miner(prepared, model)
        open_stream = None
        if config.training.input == "stream":
            shards = write_shards(prepared, data_path(workdir))
            open_stream = functools.partial(Stream.open, prepared.training_records(), shards)
        watched = with_rates(monitoring, trainer, prepared, mesh)
        fit(
            trainer,
            prepared,
            workdir,
            open_stream=open_stream,
            validate=validate,
            mine=mine,
            on_validation=on_validation,
            mesh=mesh,
            open_watch=functools.partial(Monitor, workdir, watched, phases),
        )


@contextlib.contextmanager
def write_alone(workdir: Path, what: str) -> Iterator[None]:
    """Keeps other trainings from the folder of a run, and says what to do where its disk is full.

    Args:
        workdir: Folder of the run.
        what: Name of the work.
    """
    lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    # The first of several processes holds it for all of them.
    if jax.process_index() == 0:
        lock = exclusive(workdir, what)
    again = "Then give the same command again: it goes on from what was saved."
    with explain_full_disk(workdir, again), lock:
        yield


def _kept_data(config: Config, workdir: Path, shared: Path | None) -> PreparedData | None:
    """Returns the data that a run was trained on before, or that it shares; None where the source
    is to be read.

    Until a run has a checkpoint its data may change: it is read anew.
    """
    encoder = None
    if holds_run(workdir, config) and has_checkpoint(workdir):
        encoder = Encoder.load(encoder_folder(workdir))
    if shared is not None and data_folder.is_whole(shared):
        data_folder.check_fits(shared, config)
        return data_folder.load(shared, config, encoder or data_folder.load_encoder(shared))
    if encoder is None:
        return None
    return load_data(workdir, config, encoder)


def load_data(workdir: Path, config: Config, encoder: Encoder) -> PreparedData:
    """Returns the prepared data of a run, which needs nothing of its source.

    That of a run of an earlier version, which kept none, is prepared again, and kept if it can be.
    """
    folder = data_path(workdir)
    if data_folder.is_whole(folder):
        return data_folder.load(folder, config, encoder)
    prepared = prepare(config, folder=workdir, spec=encoder.spec, encoder=encoder)
    # Before that a training may be writing it.
    if not has_checkpoint(workdir):
        return prepared
    try:
        data_folder.save(prepared, folder)
    except OSError as error:
        logging.warning("The prepared data of %s was not kept: %s", workdir, error)
    return prepared


def begin(workdir: Path, config: Config, prepared: PreparedData, shared: Path | None) -> None:
    """Makes the folder of a run, in the first process for all of them.

    Args:
        workdir: Folder of the run.
        config: Configuration of the run.
        prepared: Its data, with its encoder, which are written unless the folder has them already.
        shared: Folder of data that runs share; None for one of the run itself.

    Raises:
        ConfigError: This process does not see what the first one wrote.
    """
    if jax.process_index() == 0:
        claim(workdir, config)
        if not has_checkpoint(workdir):
            prepared.encoder.save(encoder_folder(workdir))
            data_folder.forget(data_path(workdir))
        _keep_data(workdir, prepared, shared)
    # The others must not look for the folder before it is there.
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the folder of the run is made")
    if not config_path(workdir).exists():
        raise ConfigError(
            f"--workdir={workdir} is not seen by process {jax.process_index()}: several processes "
            "need one folder that all of them see, such as a network file system or a mounted "
            "bucket."
        )


def _keep_data(workdir: Path, prepared: PreparedData, shared: Path | None) -> None:
    """Writes the prepared data of a run, or the name of the folder that it shares."""
    folder = data_path(workdir)
    if shared is None or shared.resolve() == folder.resolve():
        if not data_folder.is_whole(folder):
            data_folder.save(prepared, folder)
        return
    if not data_folder.is_whole(shared):
        prepared.encoder.save(shared / "encoder")
        data_folder.save(prepared, shared)
    # Its arrays may be those of another run, which keeps them for itself as well.
    data_folder.share(folder, data_folder.resolve(shared))
    if prepared.report is not None:
        prepared.report.save(folder)


def load_run(workdir: Path | str, *, checkpoint: str = "best") -> Run:
    """Loads a run that `train` left in a folder.

    Args:
        workdir: Folder of the run.
        checkpoint: "best", "latest" or a step.

    Raises:
        ConfigError: The folder is no run.
        CheckpointError: The run has no such checkpoint, or a damaged one.
    """
    workdir = local_folder(workdir)
    config = load_config(workdir)
    prepared = load_data(workdir, config, Encoder.load(encoder_folder(workdir)))
    model = TwoTower.build(config.model, prepared.encoder)
    abstract = _abstract_where_it_fits(Trainer.build(config, model, corpus_size(prepared)))
    # Read only: the run may still be training, and its saves in progress are not to be cleaned up.
    with open_checkpoints(workdir, config, read_only=True) as checkpoints:
        step = find_step(checkpoints, checkpoint, workdir)
        state, _ = checkpoints.restore(step, abstract)
        validated = checkpoints.metrics(step)
    return Run(workdir, config, prepared, model, state.weights, step, validated)


def _abstract_where_it_fits(trainer: Trainer) -> TrainState:
    """Returns the state to restore onto: on one device, or divided over all devices if one cannot
    hold it.

    Raises:
        ConfigError: All devices together cannot hold it either.
    """
    mesh = make_mesh(1)
    if not fits(mesh, abstract_state(trainer, mesh)):
        mesh = make_mesh()
    abstract = abstract_state(trainer, mesh)
    check_memory(mesh, abstract, {})
    return abstract


def local_folder(folder: Path | str, flag: str = "--workdir") -> Path:
    """Returns a folder as a path, that of an address as its copy on this machine.

    Args:
        folder: Folder, or an address such as gs://BUCKET/FOLDER.
        flag: Name of the flag that holds it.

    Raises:
        ConfigError: There is a file at the path.
    """
    if is_remote(folder):
        return pull(folder, flag)
    path = Path(folder)
    # Told here: what makes the folder would say that it exists already.
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{flag}={folder}: {part} is a file. Name a folder, new or begun.")
    return path


def encoder_folder(workdir: Path) -> Path:
    """Returns the folder that holds the encoder of a run."""
    return workdir / "encoder"


def data_path(workdir: Path) -> Path:
    """Returns the folder that holds the prepared data of a run."""
    return workdir / "data"


def has_checkpoint(workdir: Path) -> bool:
    """Returns whether a run has finished a checkpoint."""
    steps = (workdir / "checkpoints").glob("*")
    return any(step.name.isdigit() for step in steps)


def holds_run(workdir: Path, config: Config) -> bool:
    """Returns whether a folder holds a run of this configuration.

    A run that never reached a checkpoint (its batch was larger than the data, say) may begin again
    with another configuration.

    Raises:
        ConfigError: The folder holds a run of another configuration, or something else.
    """
    config = with_known_dtype(config, workdir)
    path = config_path(workdir)
    if not path.exists():
        others: list[Path] = []
        if workdir.exists():
            others = list(workdir.iterdir())
        # A process that was killed while it wrote the configuration leaves a temporary file.
        if (workdir / UNFINISHED).exists():
            raise ConfigError(
                f"--workdir={workdir} was left unfinished by `grow`. Give that command again."
            )
        if not all(other.name == LOCK or other.match(".config.json.*.tmp") for other in others):
            raise ConfigError(
                f"--workdir={workdir} is a folder with other files and no config.json. Name a new "
                "or empty folder."
            )
        return False
    # By way of JSON, where a tuple is a list: both sides are compared as they are written.
    old = _training_sections(read_config(path))
    new = json.loads(json.dumps(config.training_sections()))
    old = {name: old[name] for name in old if name in new}
    changed = differences(old, new, "config")
    if changed and has_checkpoint(workdir):
        reason = ""
        if any(change.startswith("config.training.input") for change in changed):
            reason = (
                " A stream has another order of rows than other inputs: of the pass that the run "
                "is in, some rows would be trained twice and others never."
            )
        raise ConfigError(
            f"--workdir={workdir} holds a run with another configuration: {'; '.join(changed)}."
            f"{reason} Name a new folder, or delete this one."
        )
    return not changed


def with_known_dtype(config: Config, workdir: Path) -> Config:
    """Returns the configuration with the type that `config.model.dtype` = "auto" stands for.

    A run keeps the type that it began with, on any machine.

    Args:
        config: Configuration of a run.
        workdir: Folder of the run, whether it has begun or not.
    """
    if config.model.dtype != "auto":
        return config
    dtype: str = fastest_dtype()
    path = config_path(workdir)
    if path.exists():
        saved = _with_defaults(read_config(path))
        dtype = saved.get("model", {}).get("dtype", dtype)
    model = dataclasses.replace(config.model, dtype=dtype)
    return dataclasses.replace(config, model=model)


def _with_defaults(old: Any) -> Any:
    """Returns a saved configuration with the options that its version did not have."""
    try:
        # Defaults compute what was computed before there was the option.
        return json.loads(from_dict(old).to_json())
    except ConfigError:
        # Of a version with other options: the differences are told as they are.
        return old


def _training_sections(old: Any) -> Any:
    """Returns the sections of a saved configuration that decide what training computes; see
    `Config.training_sections`."""
    try:
        return json.loads(json.dumps(from_dict(old).training_sections()))
    except ConfigError:
        # Of a version with other options: the differences are told as they are.
        return old


def claim(workdir: Path, config: Config) -> None:
    """Writes the configuration of a run, which makes a folder a run, and the record of its
    plugins."""
    config = with_known_dtype(config, workdir)
    with atomic(config_path(workdir)) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")
    write_record(workdir, make_record(config.plugins))
    warn_of_kinds_outside_plugins(dataclasses.asdict(config), config.plugins)


def find_step(checkpoints: Checkpoints, which: str, workdir: Path) -> int:
    """Returns the step that "best", "latest" or a number names.

    Raises:
        CheckpointError: It is none of these, or there is no checkpoint yet.
    """
    if which.isdigit():
        return int(which)
    if which not in ("best", "latest"):
        raise CheckpointError(f"--checkpoint={which!r} must be best, latest or a step.")
    if which == "best":
        step = checkpoints.best()
    else:
        step = checkpoints.latest()
    if step is None:
        line = command("train", "--config=...", f"--workdir={workdir}")
        raise CheckpointError(
            f"{checkpoints.folder} has no checkpoint yet; train until the first validation: {line}"
        )
    return step
