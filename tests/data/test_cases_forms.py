"""Logs that are no rows of events: baskets, matrices, lists, files by the kind of event."""

import pytest

from tests.data.reading import load, read_rows, write
from twotower.core.errors import ConfigError


def pairs(table):
    return list(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist()))


BASKETS = [("1", "whole milk"), ("1", "rye bread"), ("2", "rye bread"), ("2", "salt, fine")]


@pytest.mark.parametrize(
    "text, options",
    [
        ('whole milk,rye bread\nrye bread,"salt, fine"\n', {}),
        ("whole milk;rye bread;\nrye bread; salt, fine\n", {"delimiter": ";"}),
        ("whole milk\trye bread\nrye bread\tsalt, fine\n", {}),
        ("whole milk::rye bread\nrye bread::salt, fine\n", {"delimiter": "::"}),
    ],
)
def test_a_basket_a_line_is_divided_by_the_delimiter_that_is_given(tmp_path, text, options):
    path = write(tmp_path / "baskets.txt", text)
    assert pairs(load("baskets", interactions={"path": path, **options}).interactions) == BASKETS
    users = "\n".join(f"u{n} {line}" for n, line in enumerate(text.splitlines()))
    delimiter = options.get("delimiter", "\t" if "\t" in text else ",")
    path = write(
        tmp_path / "lists.txt",
        users.replace("u0 ", f"u0{delimiter}").replace("u1 ", f"u1{delimiter}"),
    )
    expected = [(f"u{int(user) - 1}", item) for user, item in BASKETS]
    assert (
        pairs(load("user_lists", interactions={"path": path, **options}).interactions) == expected
    )


def test_baskets_of_several_files_are_different_ones(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.txt", "\ufeffx,y\n\nz\n")
    rows = load("baskets", interactions={"path": str(tmp_path)}).interactions
    assert pairs(rows) == [("1", "x"), ("1", "y"), ("3", "z"), ("4", "x"), ("4", "y"), ("6", "z")]


@pytest.mark.parametrize(
    "text",
    [
        ",i1,i2,i3\nu1,5,,2.5\nu2,0,1,\n",
        "user;i1;i2;i3\nu1;5;0;2.5\nu2;;1;0.0\n",
        "sep=;\nuser;i1;i2;i3\nu1;5;NaN;2.5\nu2;;1;\n",
    ],
)
def test_a_matrix_has_a_row_for_each_cell_that_is_not_empty(tmp_path, text):
    path = write(tmp_path / "matrix.csv", text)
    table = load("matrix", interactions={"path": path}).interactions
    assert pairs(table) == [("u1", "i1"), ("u1", "i3"), ("u2", "i2")]
    assert table["rating"].to_pylist() == [5.0, 2.5, 1.0]


def test_a_matrix_of_ones_has_no_rating(tmp_path):
    path = write(tmp_path / "matrix.csv", "user,10,20\n7,1,0\n8,1,1\n")
    table = load("matrix", interactions={"path": path}).interactions
    assert table.column_names == ["user_id", "item_id"]
    assert pairs(table) == [("7", "10"), ("8", "10"), ("8", "20")]


def test_files_of_one_kind_of_event_each_are_one_log(tmp_path):
    write(tmp_path / "views-1.csv", "user_id,item_id\nu1,i1\n")
    write(tmp_path / "views-2.csv", "user_id,item_id\nu2,i1\n")
    orders = write(tmp_path / "orders.csv", "user_id,item_id,price\nu1,i1,5\n")
    events = {"view": f"{tmp_path}/views-*.csv", "purchase": orders}
    table = load(interactions={"event_files": events}).interactions
    assert table["event"].to_pylist() == ["view", "view", "purchase"]
    assert table["price"].to_pylist() == [None, None, "5"]
    with pytest.raises(ConfigError, match="path='x' must be empty beside event_files"):
        read_rows("x", event_files=events)
    write(tmp_path / "views-2.csv", "user_id,item_id,event\nu2,i1,x\n")
    with pytest.raises(ConfigError, match=r"views-2\.csv has a column 'event' of its own"):
        load(interactions={"event_files": events})


def test_values_of_several_rows_of_an_item_become_a_list(tmp_path):
    log = write(tmp_path / "log.csv", "user_id,item_id\nu,2\nu,3\n")
    text = "movie,genre,title,year\n2,Drama,Two,\n3,Noir,Three,1999\n2,War,2,1950\n2,Drama,,\n"
    options = {"path": write(tmp_path / "items.csv", text), "columns": {"item_id": "movie"}}
    items = load(interactions={"path": log}, item_table={**options, "gather": ("genre",)}).items
    assert items.to_pylist() == [
        {"item_id": "2", "genre": ["Drama", "War"], "title": "Two", "year": "1950"},
        {"item_id": "3", "genre": ["Noir"], "title": "Three", "year": "1999"},
    ]
    with pytest.raises(ConfigError, match=r"has no column 'genres' \(did you mean 'genre'"):
        load(interactions={"path": log}, item_table={**options, "gather": ("genres",)})


def test_lines_of_many_lengths_are_named_with_their_sources(tmp_path):
    lines = ["milk,bread", *(",".join(f"item {n}" for n in range(m)) for m in range(3, 9))]
    path = write(tmp_path / "baskets.csv", "\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match="'user_lists', a basket without a user 'baskets'"):
        read_rows(path)
    with pytest.raises(ConfigError, match=r"line 2: .* \(and 5 more such lines\).*'baskets'"):
        load("pairs", interactions={"path": path})


def test_a_matrix_that_is_read_as_rows_is_named(tmp_path):
    header = ["user", *(f"i{n}" for n in range(50))]
    lines = [",".join(header), *(f"u{n}" + ",1" * 50 for n in range(5))]
    path = write(tmp_path / "matrix.csv", "\n".join(lines))
    with pytest.raises(ConfigError, match="matrix of users by items.*source='matrix'.* inspect "):
        read_rows(path)


def test_a_file_without_a_header_is_named_in_one_message(tmp_path):
    path = write(tmp_path / "log.tsv", "u1\ti1\t5\nu2\ti1\t4\n")
    columns = {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp"}
    message = r"\(u1, i1, 5\) looks like a row, not like a header.*names=.* inspect .*log\.tsv"
    with pytest.raises(ConfigError, match=message):
        read_rows(path, columns=columns)


def test_all_columns_that_a_file_lacks_are_named_at_once(tmp_path):
    path = write(tmp_path / "log.csv", "userId,product,when\n1,2,3\n")
    columns = {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp"}
    with pytest.raises(ConfigError) as error:
        read_rows(path, columns=columns)
    for words in ("no columns 'user_id', 'item_id', 'timestamp'", "'user_id': 'userId'", "inspect"):
        assert words in str(error.value)


def test_a_column_that_another_one_took_the_name_of_is_named(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id\n1,2\n")
    with pytest.raises(ConfigError, match="makes the column 'user_id' 'item_id', and none the use"):
        read_rows(path, columns={"item_id": "user_id"})
