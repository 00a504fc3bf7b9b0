"""Helpers of tests that read a log from files."""

from twotower.config import DataConfig, TableConfig
from twotower.data.sources.load import load_dataset

LOG = "user_id,item_id,timestamp,rating\n7,a,100,3\n8,b,200,4.5\n7,b,300,\n"


def write(path, text, encoding="utf-8"):
    """Writes a file and returns its path as text."""
    path.write_bytes(text.encode(encoding))
    return str(path)


def load(source="csv", **tables):
    """The dataset of tables, each given by the options of its `TableConfig`."""
    configs = {name: TableConfig(**options) for name, options in tables.items()}
    return load_dataset(DataConfig(source=source, **configs))


def read_rows(path, **options):
    """The interactions of a CSV file."""
    return load(interactions={"path": path, **options}).interactions
