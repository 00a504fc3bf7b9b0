"""What is common to all sources: their names, and groups of items in the place of items."""

import dataclasses

import pytest

from tests.data.reading import load, write
from twotower.config import DataConfig, TableConfig
from twotower.core.errors import ConfigError
from twotower.data.sources.load import load_dataset


def test_an_item_group_takes_the_place_of_the_item(tmp_path):
    log = write(tmp_path / "log.csv", "user_id,item_id\nu,1\nu,2\nv,3\nv,4\n")
    items = write(tmp_path / "items.csv", "item_id,title,year\n1,Film,\n2,Film,1990\n3,,1991\n")
    config = DataConfig(
        source="csv", interactions=TableConfig(path=log), item_table=TableConfig(path=items)
    )
    data = load_dataset(dataclasses.replace(config, item_group="title"))
    assert data.interactions["item_id"].to_pylist() == ["Film", "Film", "3", "4"]
    assert data.items["item_id"].to_pylist() == ["Film", "3", "4"]
    assert data.items["year"].to_pylist() == ["1990", "1991", None]
    with pytest.raises(ConfigError, match=r"item_group='titel' .*did you mean 'title'"):
        load_dataset(dataclasses.replace(config, item_group="titel"))


def test_an_unknown_source_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.source='cvs' is not known.*did you mean 'csv'"):
        load("cvs")
