"""Pair files and user-list files: a log written in two ways, the fixed split, and the papers' own
files."""

import pytest

from twotower.config import DataConfig, SplitConfig, TableConfig
from twotower.core.errors import ConfigError
from twotower.data.sources.load import load_dataset
from twotower.data.split import split


def write(path, text):
    path.write_text(text)
    return str(path)


def load(source, path, **tables):
    configs = {name: TableConfig(**options) for name, options in tables.items()}
    log = TableConfig(path=str(path))
    return load_dataset(DataConfig(source=source, interactions=log, **configs))


def test_pair_files_and_user_lists_are_the_same_log_written_differently(tmp_path):
    pairs = write(tmp_path / "pairs.txt", "1 10\n1\t11\n\n  2  10 \n")
    lists = write(tmp_path / "lists.txt", "1 10 11\n3\n2 10\n")
    expected = [("1", "10"), ("1", "11"), ("2", "10")]
    for source, path in (("pairs", pairs), ("user_lists", lists)):
        table = load(source, path).interactions
        read = list(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist()))
        assert read == expected, source
    with pytest.raises(ConfigError, match=r"lists\.txt, line 1: '1 10 11'"):
        load("pairs", lists)


def test_rows_of_a_fixed_split_follow_and_are_marked(tmp_path):
    train = write(tmp_path / "train.txt", "0 1 2\n")
    test = write(tmp_path / "test.txt", "0 3\n")
    data = load("user_lists", train, test={"path": test})
    assert data.interactions["split"].to_pylist() == ["train", "train", "test"]
    assert data.items["item_id"].to_pylist() == ["1", "2", "3"]


def test_validation_rows_may_have_a_table_of_their_own(tmp_path):
    train = write(tmp_path / "train.txt", "0 1 2\n")
    held_out = {"path": write(tmp_path / "held.txt", "0 3\n")}
    test = {"path": write(tmp_path / "test.txt", "0 4\n1 4\n")}
    alone = load("user_lists", train, validation=held_out)
    assert alone.interactions["split"].to_pylist() == ["train", "train", "validation"]
    both = load("user_lists", train, validation=held_out, test=test).interactions
    parts = split(both, SplitConfig(kind="fixed"))
    items = [part["item_id"].to_pylist() for part in (parts.train, parts.validation, parts.test)]
    assert items == [["1", "2"], ["3"], ["4", "4"]]
    log = write(tmp_path / "log.csv", "user_id,item_id,split\n0,1,train\n")
    held_out["path"] = write(tmp_path / "held.csv", "user_id,item_id\n0,3\n")
    with pytest.raises(ConfigError, match="the train rows have a column 'split' of their own"):
        load("csv", log, validation=held_out)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"log\.txt (has no rows|is empty)"):
        load("pairs", write(tmp_path / "log.txt", text))


def test_yelp_has_the_rows_of_the_papers(shared_data):
    folder = shared_data / "yelp2018"
    data = load("user_lists", folder / "train.txt", test={"path": str(folder / "test.txt")})
    marks = data.interactions["split"].to_pylist()
    assert (marks.count("train"), marks.count("test")) == (1_237_259, 324_147)
    assert (len(data.users), len(data.items)) == (31_668, 38_048)


def test_beauty_has_the_rows_of_the_papers(shared_data):
    data = load("user_lists", shared_data / "amazon-beauty" / "Beauty.txt")
    assert (len(data.interactions), len(data.users), len(data.items)) == (198_502, 22_363, 12_101)


def test_movielens_1m_pairs_and_the_films_in_their_own_format(shared_data):
    folder = shared_data / "movielens-1m"
    data = load("pairs", folder / "ml-1m.txt")
    assert (len(data.interactions), len(data.users), len(data.items)) == (999_611, 6_040, 3_416)
    films = {"path": str(folder / "movies.dat"), "delimiter": "::", "encoding": "latin-1"}
    films |= {"names": ("item_id", "title", "genres")}
    titles = load("pairs", folder / "ml-1m.txt", item_table=films).items["title"]
    assert len(titles) - titles.null_count == 3_883
    assert titles[0].as_py() == "Toy Story (1995)"
