"""A look at a log: what its file holds, what is wrong with it, and a configuration that trains.

The columns, the times and the split are found as `tt.fit` finds them.
"""

from __future__ import annotations

import dataclasses
import re
import time as clock
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from twotower import fitting
from twotower.config import Config, TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.install import command
from twotower.core.tables import format_table, shorten
from twotower.core.times import are_spreadsheet_days, format_time
from twotower.data import guess
from twotower.data.dialect import FileForm, find_form
from twotower.data.sources.frames import LOGS, read_form
from twotower.experiment import changed_options, load_config
from twotower.pipeline.prepare import read_parts

_WRITTEN = "Written by `twotower inspect`"  # the beginning of a file that may be written again
_ANY = fitting.Columns()
_ROWS = 3  # rows that are shown
_COLUMNS = 8  # columns of these
_WIDTH = 24  # letters of a cell
# Options of files of text, which are found with the form of the file.
_OF_FORM = (
    "names",
    "delimiter",
    "quoting",
    "comment",
    "skip_lines",
    "bad_rows",
    "encoding",
    "decimal",
)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found in a file.

    Attributes:
        lines: Lines to print.
        config: Configuration that trains on it.
    """

    lines: list[str]
    config: Config


def inspect(
    path: str,
    *,
    items: str = "",
    users: str = "",
    columns: fitting.Columns = _ANY,
    timestamp_format: str = "",
) -> Inspection:
    """Looks at a log, and chooses the options that suit it.

    Args:
        path: File, folder or glob of the log.
        items: Table of the items; empty for none.
        users: Table of the users; empty for none.
        columns: Columns that the caller names; others are found.
        timestamp_format: Strptime format of the times, where day and month cannot be told apart.

    Raises:
        ConfigError: It is no log that can be trained on.
    """
    form = find_form(path, TableConfig(), "interactions")
    raw, form, problems = _read(form)
    lines = [f"{path}: {form.words}, {form.config.encoding}." if form.source != "parquet" else path]
    lines += [f"  {problem}" for problem in problems]
    lines += ["", *_sample(raw), "", guess.describe(raw, now=clock.time()), ""]
    options = {}
    if timestamp_format:
        options["data.interactions.timestamp_format"] = timestamp_format
    if form.source not in LOGS:
        for name in _changed_form(form.config):
            options[f"data.interactions.{name}"] = getattr(form.config, name)
    # Read once more, by the form that was found: what is told is what training will read.
    log = fitting.read_log(
        path, items=items or None, users=users or None, columns=columns, config=options
    )
    lines += [*log.said, *_times(log.tables["interactions"])]
    lines += [*_unused(raw, log.configs["interactions"]), "", "Splits:"]
    lines += [f"  {line}" for line in fitting.describe_splits(log)]
    return Inspection(lines, _configure(log, form, items, users))


def write(config: Config, out: Path, path: str) -> None:
    """Writes an experiment file, and reads the data by it.

    Args:
        config: Configuration of the experiment.
        out: File to write.
        path: Path of the log, for the description in the file.

    Raises:
        ConfigError: The file is another one, or the data cannot be read as it says.
    """
    if out.suffix != ".py":
        raise ConfigError(f"--out={out} must end in .py: an experiment is a file of Python.")
    # Only a file that this wrote, and nobody has made their own, is written over.
    if out.exists() and _WRITTEN not in out.read_text(encoding="utf-8", errors="replace")[:200]:
        raise ConfigError(f"--out={out} is there already: name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(_experiment(config, out, path)), encoding="utf-8")
    # What was found is what training will read.
    read_parts(load_config(out))


def _read(form: FileForm) -> tuple[pa.Table, FileForm, list[str]]:
    """Returns the rows of a file, its form with the cures that it took, and what was wrong."""
    problems: list[str] = []
    # One cure at a time: a file that is read further may show the next fault.
    while True:
        try:
            table, _ = read_form(form, "interactions")
            return table, form, problems
        except ConfigError as error:
            cure = _cure(str(error), form.config)
            if cure is None:
                raise
            taken = ", ".join(f"{name}={value!r}" for name, value in cure.items())
            problems.append(f"{error} Taken here: {taken}.")
            form = dataclasses.replace(form, config=dataclasses.replace(form.config, **cure))


def _cure(message: str, config: TableConfig) -> dict[str, str] | None:
    """Returns the option that a refusal offers, where it was not taken yet."""
    if ".quoting='off'" in message and config.quoting != "off":
        return {"quoting": "off"}
    for treatment in ("pad", "skip"):
        if f".bad_rows='{treatment}'" in message and config.bad_rows != treatment:
            return {"bad_rows": treatment}
    if ".encoding" in message and config.encoding == "utf-8":
        return {"encoding": "latin-1"}
    return None


def _changed_form(config: TableConfig) -> Iterator[str]:
    for name in _OF_FORM:
        if getattr(config, name) != getattr(TableConfig(), name):
            yield name


def _sample(raw: pa.Table) -> list[str]:
    names = raw.column_names[:_COLUMNS]
    rows = []
    for row in raw.slice(0, _ROWS).select(names).to_pylist():
        rows.append([shorten(str(row[name]), _WIDTH) for name in names])
    return format_table(rows, [shorten(name, _WIDTH) for name in names]).split("\n")


def _times(log: pa.Table) -> Iterator[str]:
    if "timestamp" in log.column_names:
        bounds = pc.min_max(log["timestamp"]).as_py()
        yield f"times: {format_time(bounds['min'])} to {format_time(bounds['max'])} UTC."


def _unused(raw: pa.Table, config: TableConfig) -> Iterator[str]:
    """Yields lines on the columns that the configuration does not read."""
    others = [name for name in raw.column_names if name not in config.columns.values()]
    for name in others:
        if are_spreadsheet_days(raw[name]):
            yield (
                f"{name!r} looks like times in days of a spreadsheet, which are not read: write "
                "them as text there, such as 2024-01-31."
            )
    if others:
        yield (
            f"not read: {', '.join(others)}. A count or a rating is a threshold by "
            "config.data.where=((NAME, '>=', 4),), a weight by columns={'weight': NAME}."
        )


def _configure(log: fitting.Log, form: FileForm, items: str, users: str) -> Config:
    config = fitting.make_config(log, None)
    interactions = dataclasses.replace(log.configs["interactions"], path=form.config.path)
    for name in _OF_FORM:
        changed = {name: getattr(form.config, name)}
        interactions = dataclasses.replace(interactions, **changed)
    if "timestamp" not in log.tables["interactions"].column_names:
        # The split was chosen without them, and a configuration that reads them would be refused.
        interactions = _without_times(interactions)
    # A file that is no table of rows has no columns to be named.
    if form.source in LOGS:
        interactions = form.config
    elif interactions.names:
        interactions = _with_our_names(interactions)
    tables = {"interactions": interactions}
    for name, path in (("item_table", items), ("user_table", users)):
        tables[name] = TableConfig()
        if path:
            side = find_form(path, TableConfig(), name).config
            tables[name] = dataclasses.replace(side, columns=log.configs[name].columns)
    data = dataclasses.replace(config.data, source=form.source, where=log.where, **tables)
    return dataclasses.replace(config, data=data)


def _without_times(config: TableConfig) -> TableConfig:
    """Returns the options of a log whose times are of no use."""
    columns = dict(config.columns)
    source = columns.pop("timestamp", "")
    if source == "timestamp":
        # Under another name, or it would be taken for the time of the event all the same.
        columns["unused_timestamp"] = source
    return dataclasses.replace(
        config, columns=columns, timestamp_format="", timestamp_unit=TableConfig().timestamp_unit
    )


def _with_our_names(config: TableConfig) -> TableConfig:
    """Returns the options of a file without a header, with our names in its place."""
    ours = {theirs: name for name, theirs in config.columns.items()}
    names = tuple(ours.get(name, name) for name in config.names)
    return dataclasses.replace(config, names=names, columns={})


def _experiment(config: Config, out: Path, path: str) -> Iterator[str]:
    workdir = re.sub(r"\W+", "_", out.stem)
    yield f'"""{_WRITTEN} for {Path(path).name!r}.'
    yield ""
    yield f"    {command('train', f'--config={out}', f'--workdir=runs/{workdir}')}"
    yield '"""'
    yield ""
    yield "from twotower.config import defaults"
    yield ""
    yield ""
    yield "def get_config():"
    yield "    config = defaults()"
    for option, value in changed_options(config):
        # An entry a line, as somebody changes one feature at a time.
        if isinstance(value, Mapping) and value:
            yield f"    config.{option} = {{"
            for name, entry in value.items():
                yield f"        {name!r}: {entry!r},"
            yield "    }"
        else:
            yield f"    config.{option} = {value!r}"
    yield "    return config"
    yield ""
