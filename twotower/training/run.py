"""A run is a directory: its configuration, encoder, checkpoints and metrics. Every later command
needs only the folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from twotower.config import Config, from_dict
from twotower.core.errors import CheckpointError, ConfigError
from twotower.core.files import atomic
from twotower.core.mesh import make_mesh
from twotower.features.encoder import Encoder
from twotower.pipeline.prepare import PreparedData, prepare
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.candidates import corpus_size
from twotower.training.checks import check_batch
from twotower.training.init import abstract_state
from twotower.training.loop import Validate, fit, open_checkpoints
from twotower.training.memory import check_memory, fits
from twotower.training.state import Trainer, TrainState, resolve_kinds


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, loaded.

    Attributes:
        step: of the checkpoint that `weights` come from.
    """

    workdir: Path
    config: Config
    prepared: PreparedData
    model: TwoTower
    weights: Weights
    step: int


def train(
    config: Config,
    workdir: Path | str,
    *,
    make_validate: Any = None,
    make_miner: Any = None,
    devices: int = 0,
) -> None:
    """Trains `config` in `workdir`, or goes on with it; with several processes, in a folder that
    all of them see.

    Args:
        make_validate: (prepared, model) -> `Validate`, called where validation rows exist.
        make_mine: (prepared, model) -> `Miner`, called where hard negatives are to be mined.
        devices: how many to use; 0: all.

    Raises:
        ConfigError: `workdir` holds a run of another configuration, or the data or a field is
            unusable.
        TrainingError: see `twotower.training.loop.fit`.
    """
    workdir, mesh = local_folder(workdir), make_mesh(devices)
    check_batch(config.training, mesh)
    resolve_kinds(config)  # a misspelt loss is refused before the data is read, not after
    folder = workdir / "encoder"
    # encoder.json is written last: without it a killed process had not finished the folder.
    is_fitted = _is_begun(workdir, config) and (folder / "encoder.json").exists()
    known = Encoder.load(folder) if is_fitted else None
    prepared = prepare(config, encoder=known)
    model = TwoTower.build(config.model, prepared.encoder)
    trainer = Trainer.build(config, model, corpus_size(prepared))
    # Only now that everything fits: a mistake found above leaves the folder free for the corrected
    # configuration.
    if jax.process_index() == 0:
        claim(workdir, config)
        if known is None:
            prepared.encoder.save(folder)
    _meet("the folder of the run is made")
    if not (workdir / "config.json").exists():
        raise ConfigError(
            f"--workdir={workdir} is not seen by process {jax.process_index()}: several processes need one folder that all of "
            "them see, such as a network file system or a mounted bucket."
        )
    validate: Validate | None = None
    if len(prepared.validation) and make_validate:
        validate = make_validate(prepared, model)
    mine = make_miner(prepared, model) if trainer.sampling.config.mined else None
    fit(trainer, prepared, workdir, validate=validate, mine=mine, mesh=mesh)


def _meet(what: str) -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def load_run(workdir: Path | str, *, checkpoint: str = "best") -> Run:
    """Loads what `train` left in `workdir`.

    Args:
        checkpoint: "best", "latest" or a step.

    Raises:
        ConfigError: `workdir` is no run.
        CheckpointError: it has no such checkpoint, or a damaged one.
    """
    workdir = local_folder(workdir)
    config = load_config(workdir)
    prepared = prepare(config, encoder=Encoder.load(workdir / "encoder"))
    model = TwoTower.build(config.model, prepared.encoder)
    abstract = _abstract_where_it_fits(Trainer.build(config, model, corpus_size(prepared)))
    with open_checkpoints(workdir, config, read_only=True) as checkpoints:
        step = step_of(checkpoints, checkpoint, workdir)
        state, _ = checkpoints.restore(step, abstract)
    return Run(workdir, config, prepared, model, state.weights, step)


def _abstract_where_it_fits(trainer: Trainer) -> TrainState:
    """The state to restore onto: on one device, or divided over all of this process where one
    cannot hold it.

    Raises:
        ConfigError: all together cannot either.
    """
    mesh = make_mesh(1)
    if not fits(mesh, abstract_state(trainer, mesh)):
        mesh = make_mesh()
    abstract = abstract_state(trainer, mesh)
    check_memory(mesh, abstract, {})
    return abstract


def local_folder(workdir: Path | str) -> Path:
    """`workdir` as a path; refuses an address."""
    # `Path` would make "gs://bucket" a local folder named "gs:".
    if "://" in str(workdir) or str(workdir).startswith("gs:/"):
        raise ConfigError(
            f"--workdir={workdir} must be a folder of this machine (or one mounted into it)."
        )
    return Path(workdir)


def load_config(workdir: Path) -> Config:
    """The configuration of a run."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(
            f"--workdir={workdir} is no run: it has no config.json. Train one first: "
            f"python -m experiments.train --config=experiments/configs/quickstart.py --workdir={workdir}"
        )
    return from_dict(_read_json(path))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}). Restore it, or delete the folder and train again."
        ) from None


def _is_begun(workdir: Path, config: Config) -> bool:
    """Whether `workdir` holds a run of this configuration; refuses one of another, and a folder of
    something else.

    A run that never reached a checkpoint (its batch was larger than the data, say) may be begun
    again otherwise.
    """
    path = workdir / "config.json"
    if not path.exists():
        others = list(workdir.iterdir()) if workdir.exists() else []
        # A process that was killed while it wrote the configuration leaves a temporary file.
        if not all(other.match(".config.json.*.tmp") for other in others):
            raise ConfigError(
                f"--workdir={workdir} is a folder with other files and no config.json. Name a new or empty folder."
            )
        return False
    old, new = _read_json(path), json.loads(config.to_json())
    changed = _differences(
        *(
            {name: x for name, x in values.items() if name in config.training_sections()}
            for values in (old, new)
        )
    )
    if changed and any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*")):
        raise ConfigError(
            f"--workdir={workdir} holds a run with another configuration: {'; '.join(changed)}. Name a new folder, or "
            "delete this one."
        )
    return not changed


def claim(workdir: Path, config: Config) -> None:
    """Writes the configuration of the run."""
    with atomic(workdir / "config.json") as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")


def _differences(old: Any, new: Any, where: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{where}.{n}")]
    return [] if old == new else [f"{where} was {old!r} and is now {new!r}"]


def step_of(checkpoints: Any, which: str, workdir: Path) -> int:
    """The step that "best", "latest" or a number names."""
    if which not in ("best", "latest") and not which.isdigit():
        raise CheckpointError(f"--checkpoint={which!r} must be best, latest or a step.")
    step = {"best": checkpoints.best, "latest": checkpoints.latest}.get(which, lambda: int(which))()
    if step is None:
        again = f"python -m experiments.train --config=... --workdir={workdir}"
        raise CheckpointError(
            f"{checkpoints.folder} has no checkpoint yet; train until the first validation: {again}"
        )
    return step
