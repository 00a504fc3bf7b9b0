"""Trained runs taken on to more rows: those that were held out (`refit`), or new ones (`grow`).

Both read the folder of the run alone. `twotower.api` trains what they begin.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from twotower.config import (
    Config,
    DataConfig,
    FeaturesConfig,
    SplitConfig,
    TableConfig,
    TrainingConfig,
)
from twotower.core.errors import ConfigError
from twotower.core.fields import build
from twotower.core.files import atomic, read_json
from twotower.data.contract import KEYS, Contract
from twotower.data.dataset import Dataset, assemble
from twotower.data.filters import filter_rows
from twotower.data.interactions import PARTS
from twotower.data.sources import bigquery
from twotower.data.sources.frames import TableLike, read_table
from twotower.data.sources.load import with_uses
from twotower.data.tables import apply_contract
from twotower.features.encoder import Encoder
from twotower.fitting import Columns, read_tables
from twotower.pipeline.describe import list_separators
from twotower.pipeline.further_rows import with_test_rows
from twotower.pipeline.labels import label_uses
from twotower.pipeline.prepare import PreparedData, join_parts
from twotower.training.grow import GROWN, grow
from twotower.training.loop import open_checkpoints
from twotower.training.run import (
    config_path,
    encoder_folder,
    find_step,
    load_config,
    load_data,
    local_folder,
)

REFIT = "refit"  # folder of the refit in that of its run
TEST = "test"  # name of further test rows, in messages
BIGQUERY = "bq://"  # before the name of a table there
RECORD = "refit.json"  # in that folder: what was validated, and what the refit saw


@dataclasses.dataclass(frozen=True)
class Refit:
    """A refit that can be trained.

    Attributes:
        folder: Folder of its run.
        config: Configuration of its training.
        dataset: All rows of the run.
        record: Content of its record, as JSON.
    """

    folder: Path
    config: Config
    dataset: Dataset
    record: Mapping[str, Any]


def begin_refit(source: Path | str, *, on_top: bool) -> Refit:
    """Prepares the training of a run on all its rows, for as many passes as its best step took.

    Args:
        source: Folder of a trained run.
        on_top: Whether the best checkpoint is trained further, in the place of fresh weights. A
            run that has grown gets as many passes as it had since.

    Raises:
        ConfigError: The folder is no run, holds nothing out, or holds a refit of the other kind.
        CheckpointError: The run has no checkpoint yet.
    """
    source = local_folder(source)
    config = load_config(source)
    if config.split.kind == "none":
        raise ConfigError(f"--workdir={source} was trained on all of its rows already.")
    with open_checkpoints(source, config, read_only=True) as checkpoints:
        # The best one, not the last: training went on for as long as patience lasts.
        step = find_step(checkpoints, "best", source)
        validated = checkpoints.metrics(step)
    prepared = load_data(source, config, Encoder.load(encoder_folder(source)))
    start = 0
    # Its steps go on from those of the run before, which saw other rows.
    if on_top and (source / GROWN).exists():
        start = read_json(source / GROWN)["step"]
    # In passes and not in steps: with more rows as many passes take more steps.
    passes = (step - start) * config.training.batch_size / prepared.num_examples
    dataset = join_parts(prepared)
    refit_config = _without_held_out(config, passes)
    folder = source / REFIT
    if on_top:
        refit_config = _begin_on_top(refit_config, source, folder, step, passes, dataset)
    elif (folder / GROWN).exists():
        raise _other_kind(folder)
    else:
        # As the run holds them: a file of features need not be there any more.
        features = build(FeaturesConfig, prepared.encoder.spec.to_dict(), "config.features")
        refit_config = dataclasses.replace(refit_config, features=features)
    record = {
        # Relative, so that the run may be moved with the refit in it.
        "of": os.path.relpath(source, folder),
        "step": step,
        "passes": round(passes, 4),
        "on_top": on_top,
        "metric": config.training.metric,
        "validated": validated,
        "rows": {"validated": len(prepared.train), "refit": len(dataset.interactions)},
    }
    return Refit(folder, refit_config, dataset, record)


def write_record(refit: Refit) -> None:
    """Writes what was validated, and what the refit saw, into the folder of the refit."""
    with atomic(refit.folder / RECORD) as temporary:
        temporary.write_text(json.dumps(refit.record, indent=2) + "\n", encoding="utf-8")


def read_record(workdir: Path) -> dict[str, Any] | None:
    """Returns the record of a refit; None for a run that is none."""
    path = workdir / RECORD
    if not path.exists():
        return None
    return read_json(path)


def format_record(record: Mapping[str, Any]) -> str:
    """Returns a line on what a refit saw and on what was validated."""
    rows = record["rows"]
    start = f"the checkpoint of step {record['step']:,}" if record["on_top"] else "fresh weights"
    metric = record["metric"]
    figure = "not validated"
    if metric in record["validated"]:
        figure = f"{metric} {record['validated'][metric]:.4f}"
    return (
        f"refit: {rows['refit']:,} rows, {record['passes']:g} passes from {start}. Validated with "
        f"{rows['validated']:,} of them at step {record['step']:,}: {figure}."
    )


def _without_held_out(config: Config, passes: float) -> Config:
    """Returns a configuration that trains on all rows for some passes."""
    split = SplitConfig(kind="none", validation=0.0, test=0.0)
    # All rows are in one table now.
    data = dataclasses.replace(config.data, validation=TableConfig(), test=TableConfig())
    # The three ways to bound a training exclude each other: only passes are left.
    training = dataclasses.replace(
        config.training, steps=TrainingConfig().steps, steps_for=0, passes=passes
    )
    return dataclasses.replace(config, split=split, data=data, training=training)


def _begin_on_top(
    config: Config, source: Path, folder: Path, step: int, passes: float, dataset: Dataset
) -> Config:
    """Takes a checkpoint over to all rows, unless that is done, and returns the configuration."""
    # Begun before: it goes on, and is not taken over from the checkpoint once more.
    if config_path(folder).exists():
        if not (folder / GROWN).exists():
            raise _other_kind(folder)
        return load_config(folder)
    grow(
        config,
        source,
        folder,
        # Ids that only held-out rows have get rows of the tables now, which begin as those of
        # strangers.
        new_rows="oov",
        checkpoint=str(step),
        dataset=dataset,
        passes=passes,
    )
    return load_config(folder)


def _other_kind(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} holds a refit of the other kind (from fresh weights, or on top): delete it to "
        "make another one."
    )


def read_further_rows(
    prepared: PreparedData,
    interactions: TableLike,
    *,
    items: TableLike | None,
    users: TableLike | None,
    columns: Columns,
) -> tuple[Dataset, list[str]]:
    """Returns the log of a run with further rows behind its own, and lines on what was read.

    Args:
        prepared: Data of the run.
        interactions: Further rows of the log.
        items: Table of new or changed items; None for none.
        users: Table of new or changed users; None for none.
        columns: Columns that the caller names.

    Raises:
        ConfigError: A table or column cannot be used, or has other types than the run's.
    """
    said: list[str] = []
    config = prepared.config
    encoder = prepared.encoder
    read = read_tables(
        interactions,
        items=items,
        users=users,
        columns=columns,
        data=config.data,
        said=said,
        contract=encoder.contract,
    )
    known = join_parts(prepared)
    log = read.typed["interactions"]
    # A log without times has none for its further rows.
    for name in ("timestamp", "split"):
        if name in log.column_names and name not in known.interactions.column_names:
            log = log.drop_columns([name])
    # Rows that came later are trained on; a table with a column of splits says so itself.
    if "split" in known.interactions.column_names and "split" not in log.column_names:
        log = log.append_column("split", pa.repeat("train", len(log)))
    new = assemble(log, read.typed.get("user_table"), read.typed.get("item_table"))
    # Read as what they are used for: the rows of the run are so already.
    uses = encoder.spec.uses() | {"log": label_uses(config.objective)}
    new = with_uses(dataclasses.replace(new, contract=encoder.contract), uses)
    joined = assemble(
        _stack(known.interactions, new.interactions, "interactions"),
        # The first value of an id counts: new tables say what is so now.
        _stack(new.users, known.users, "users"),
        _stack(new.items, known.items, "items"),
    )
    joined = dataclasses.replace(
        joined,
        has_catalogue=known.has_catalogue or items is not None,
        contract=new.contract,
    )
    return joined, said


def read_test_rows(prepared: PreparedData, source: TableLike, *, name: str = "") -> PreparedData:
    """Returns the data of a run with the rows of a further test set in the place of its own.

    They are read as further rows of the log: the same forms of ids and times, and the conditions of
    `config.data.where`.

    Args:
        prepared: Data of the run.
        source: Table of any kind, the path of one, or bq://PROJECT.DATASET.TABLE.
        name: Name of the set; "" takes that of the file.

    Raises:
        ConfigError: It cannot be read, or nothing is left of it.
    """
    config = prepared.config
    encoder = prepared.encoder
    location = "the test set"
    if isinstance(source, (str, os.PathLike)):
        location = os.fspath(source)
    table = source
    if isinstance(source, str) and source.startswith(BIGQUERY):
        table = _read_bigquery(source, config.data)
    # Rows of a fixed split may have names and forms of their own.
    form = config.data.test if config.data.test.path else config.data.interactions
    said: list[str] = []
    try:
        log = _read_log(table, form, config.data, encoder.contract, said)
    except ConfigError as error:
        # Readers name the option of a table of the configuration.
        raise ConfigError(str(error).replace(f"config.data.{TEST}.path=", "--test=")) from None
    # All of them are test rows, whatever a column says.
    new = assemble(log.drop_columns(["split"]) if "split" in log.column_names else log)
    uses = encoder.spec.uses() | {"log": label_uses(config.objective)}
    new = with_uses(dataclasses.replace(new, contract=encoder.contract), uses)
    # A k-core is one of the whole log, and of further rows it would leave nearly none.
    filters = dataclasses.replace(config.data, k_core=0)
    kept = filter_rows(new, filters, separators=list_separators(encoder.spec))
    notes = [line.strip() for line in said]
    if config.data.item_group:
        notes.append(f"Its items are taken for values of item_group={config.data.item_group!r}.")
    for note in kept.dropped:
        if note.rows:
            notes.append(f"{note.rows:,} of {note.total:,} rows {note.reason} are left out.")
    return with_test_rows(
        prepared,
        kept.interactions,
        name=name or _name_of(location),
        source=location,
        notes=tuple(notes),
    )


def _read_log(
    source: TableLike, form: TableConfig, data: DataConfig, contract: Contract, said: list[str]
) -> pa.Table:
    """Returns rows with our names and types: by the names of the configuration, or by guess."""
    rows, origin = read_table(source, form, TEST)
    columns = {}
    for ours in dict.fromkeys([*KEYS, "timestamp", *form.columns]):
        theirs = form.columns.get(ours, ours)
        # A file may have our names although those of the log were others.
        for name in (theirs, ours):
            if name in rows.column_names:
                # The log's own name first, where the file has both.
                columns.setdefault(ours, name)
    if not set(KEYS) <= set(columns):
        options = dataclasses.replace(data, interactions=form)
        try:
            read = read_tables(
                source,
                items=None,
                users=None,
                columns=Columns(),
                data=options,
                said=said,
                contract=contract,
            )
        except ConfigError as error:
            keys = " and ".join(repr(form.columns.get(key, key)) for key in KEYS)
            raise ConfigError(
                f"{origin.name} has no columns {keys}, as the log of the run has: rename them. "
                f"({error})"
            ) from None
        return read.typed["interactions"]
    # As the times of the log were read, whatever a few rows look like.
    time = contract.time
    options = dataclasses.replace(
        form, columns=columns, timestamp_unit=time.unit, timestamp_format=time.format
    )
    typed, _ = apply_contract(rows, options, TEST, origin=origin, contract=contract)
    return typed


def _read_bigquery(address: str, data: DataConfig) -> pa.Table:
    """Returns a table of BigQuery in an order that is always the same."""
    client = bigquery.make_client(data.project, data.location)
    table = TableConfig(path=address.removeprefix(BIGQUERY))
    rows, _ = bigquery.read_raw(table, "test", client=client)
    # A query has no order, and the figures of equal rows would differ from one reading to the next.
    return bigquery.sort_rows(rows, ())


def _name_of(source: str) -> str:
    """Returns the name of a file without its folder and kind, as a part of the names of files."""
    stem = Path(source.removeprefix(BIGQUERY)).name.partition(".csv")[0].partition(".parquet")[0]
    name = re.sub(r"[^\w-]+", "_", stem).strip("_")
    # These are names of the parts of the log, whose figures must not be replaced.
    return f"{name}_rows" if name in (*PARTS, "") else name


def _stack(first: pa.Table, second: pa.Table, name: str) -> pa.Table:
    """Returns the rows of two tables; what one of them lacks is null in its rows."""
    try:
        # Permissive: an empty column of a small file has no type of its own.
        return pa.concat_tables([first, second], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = " ".join(map(str, error.args))
        raise ConfigError(
            f"{name}: a column has another type than in the rows of the run ({reason})."
        ) from None
