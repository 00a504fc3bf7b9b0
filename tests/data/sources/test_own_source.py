"""What a source of one's own returns is held to the same contract as files."""

import dataclasses

import pyarrow as pa
import pytest

from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.data.sources.load import SOURCES, Tables, load_dataset

LOG = {"customer": [7, 8, 7], "item_id": ["a", "b", "b"], "timestamp": [1, 2, 3]}


@dataclasses.dataclass(frozen=True)
class Options:
    rows: int = 3


def load(**data):
    columns = {"interactions": {"columns": {"user_id": "customer"}}}
    return load_dataset(from_dict({"data": {"source": "mine"} | columns | data}).data)


@pytest.fixture(autouse=True)
def unregistered():
    yield
    if "mine" in SOURCES:
        del SOURCES["mine"]


@pytest.mark.parametrize("kind", ["arrow", "pandas", "polars"])
def test_a_lone_table_of_any_library_is_the_log(kind):
    log = pa.table(LOG)
    if kind == "pandas":
        log = pytest.importorskip("pandas").DataFrame(LOG)
    if kind == "polars":
        log = pytest.importorskip("polars").DataFrame(LOG)
    SOURCES["mine"] = lambda config: log
    dataset = load()
    assert dataset.interactions["user_id"].to_pylist() == ["7", "8", "7"]
    assert dataset.items["item_id"].to_pylist() == ["a", "b"]
    assert not dataset.has_catalogue


def test_it_is_called_with_its_options_and_may_return_all_tables():
    items = pa.table({"item_id": ["b", "c"], "price": [1.0, 2.0]})

    def read(config, *, options):
        return Tables(pa.table(LOG).slice(0, options.rows), items=items)

    SOURCES.register("mine", read, options=Options)
    dataset = load(options={"rows": 2})
    assert len(dataset.interactions) == 2 and dataset.has_catalogue
    assert dataset.items["price"].to_pylist() == [1.0, 2.0, None]
    with pytest.raises(ConfigError, match="config.data.options has no field 'row'; did you mean"):
        load(options={"row": 2})


def test_a_value_of_the_wrong_type_is_refused_as_in_a_file():
    SOURCES["mine"] = lambda config: pa.table(LOG | {"timestamp": ["1", "x", "3"]})
    with pytest.raises(ConfigError, match="column 'timestamp': 'x' is not"):
        load()


def test_the_librarys_sources_have_no_options_of_their_own():
    with pytest.raises(ConfigError, match="the source 'shop' has no options of its own"):
        load_dataset(from_dict({"data": {"options": {"rows": 2}}}).data)
