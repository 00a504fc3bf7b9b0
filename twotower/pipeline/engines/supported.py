"""What a log must not ask for to be prepared by an engine that keeps no rows in memory."""

from __future__ import annotations

from twotower.config import Config
from twotower.core.errors import ConfigError
from twotower.data.contract import KEYS
from twotower.data.sources.load import describes_items
from twotower.features.spec import FeatureSpec
from twotower.pipeline.engines.divide import KINDS
from twotower.pipeline.engines.reading.log_reading import PARQUET

# Names of the source whose files are text.
_TEXT = ("csv", "tsv", "text", "file")
# Names of the source that is a warehouse.
_WAREHOUSE = ("bigquery", "bq", "sql")


def check_supported(config: Config, spec: FeatureSpec, engine: str) -> None:
    """Refuses what rows in memory alone have.

    Args:
        config: Configuration of the run.
        spec: Features of the run.
        engine: Kind of engine, for the message.

    Raises:
        ConfigError: An option is not done here; the message names it.
    """
    data = config.data
    in_warehouse = engine == "bigquery"
    sources = _WAREHOUSE if in_warehouse else (*_TEXT, *PARQUET)
    undone = {
        f"data.source={data.source!r}": data.source not in sources,
        f"data.item_group={data.item_group!r}": bool(data.item_group) and in_warehouse,
        f"data.item_table.path={data.item_table.path!r}, the file of the log": describes_items(
            data
        ),
        # Of files a query is refused where they are found to be missing.
        "data.validation.query": bool(data.validation.query),
        "data.test.query": bool(data.test.query),
        f"split.kind={config.split.kind!r}": config.split.kind not in KINDS,
    }
    if engine != "duckdb":
        for name in ("validation", "test"):
            path = getattr(data, name).path
            undone[f"data.{name}.path={path!r}"] = bool(path)
    for condition in data.where:
        # The script compares before ids have their form.
        if condition and condition[0] in KEYS and in_warehouse:
            undone[f"data.where={condition!r}"] = True
    for use in spec.uses().get("user", {}).values():
        # The form of such times is found on the whole column.
        undone[f"{use.field}, which reads times of text"] = use.kind == "time" and not use.time
    for words, is_undone in undone.items():
        if is_undone:
            raise ConfigError(
                f"config.{words} is not done by --engine={engine}: use --engine=memory."
            )
