"""What a training would do, checked and told without doing it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

# Sources whose rows cost nothing but the time to read them.
CHEAP_SOURCES = ("csv", "parquet", "json", "pairs", "user_lists", "baskets", "matrix", "shop")


def define(flag_values: flags.FlagValues) -> flags.FlagHolder[bool | None]:
    """Defines --dry_run."""
    return flags.DEFINE_bool(
        "dry_run",
        False,
        "Check everything and say what would be done, only.",
        flag_values=flag_values,
    )


def describe_training(config: Any, workdir: Path | str, *, devices: int = 0) -> str:
    """Returns what `api.train` would do, after the checks that it makes before the first step.

    Args:
        config: Configuration of the experiment.
        workdir: Folder of the run.
        devices: Number of devices to train on; 0 takes all.

    Raises:
        ConfigError: As `api.train` would, for a field, the folder or the data.
    """
    # Here, since the module is imported to define a flag, for --help too, which must not wait for
    # JAX.
    from twotower import api
    from twotower.core.mesh import make_mesh
    from twotower.experiment import changed_options
    from twotower.features.encoder import Encoder
    from twotower.features.spec import load_spec
    from twotower.training.checks import check_batch
    from twotower.training.run import encoder_folder, has_checkpoint, holds_run, local_folder
    from twotower.training.state import resolve_kinds

    folder = local_folder(workdir)
    mesh = make_mesh(devices)
    check_batch(config.training, mesh)
    api.check_names(config, folder)
    # As training does before it reads the data, so that a name nobody knows is refused here too.
    resolve_kinds(config)
    state = "a new run"
    if holds_run(folder, config) and has_checkpoint(folder):
        # As the run holds them: a file of features need not be there any more.
        spec = Encoder.load(encoder_folder(folder)).spec
    else:
        spec = load_spec(config.features)
    if holds_run(folder, config):
        state = f"goes on from step {latest_step(folder):,}"
    names = {side: ", ".join(spec.side(side)) for side in ("user", "item")}
    lines = [
        f"Would train in {workdir}: {state}, on {mesh.size} device(s).",
        *describe_data(config, folder),
        f"Features: user {names['user']}; item {names['item']}.",
        f"Loss {config.objective.loss}, batches of {config.training.batch_size:,}.",
        "Options that differ from their defaults:",
        *(f"  --config.{name}={value!r}" for name, value in changed_options(config)),
        "Nothing was written.",
    ]
    return "\n".join(lines)


def latest_step(folder: Path) -> int:
    """Returns the step of the latest checkpoint of a run; 0 without any."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    # A checkpoint is named by its step; one that is being written has a longer name.
    return max((int(name) for name in names if name.isdigit()), default=0)


def describe_data(config: Any, folder: Path) -> Iterator[str]:
    """Yields lines on the data, with the sizes of its parts where that costs nothing."""
    from twotower.data.report import DataReport
    from twotower.features.spec import load_spec
    from twotower.pipeline import folder as data_folder
    from twotower.pipeline.event_weights import with_event_weights
    from twotower.pipeline.prepare import read_and_describe
    from twotower.training.run import data_path, has_checkpoint

    kept = data_path(folder)
    if has_checkpoint(folder) and data_folder.is_whole(kept):
        yield f"Data: what the run was begun with, in {kept}."
        report = DataReport.load(data_folder.resolve(kept))
        if report is not None:
            yield from report.lines()
        return
    # A query in BigQuery is paid for each time.
    if config.data.source not in CHEAP_SOURCES:
        yield f"Data: {config.data.source}, split by {config.split.kind}; not read now."
        return
    spec = with_event_weights(load_spec(config.features), config)
    report = read_and_describe(config, spec, folder=folder).report
    for warning in report.warnings:
        yield f"WARNING: {warning}"
    yield from report.lines()
    training = config.training.scaled_to(report.parts["train"])
    # Whole sequences are packed, so that their number is known only after the data is encoded.
    if config.training.examples == "interactions":
        yield f"Steps: up to {training.steps:,}, a validation every {training.validate_every:,}."
