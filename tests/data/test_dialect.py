"""The form of a file that nobody described."""

import pytest

from tests.data.reading import write
from twotower.config import TableConfig
from twotower.data.dialect import find_form

ROWS = [
    (f"u{n % 7}", f"i{n % 5}", f"2024-01-{n % 28 + 1:02d} 10:00:00", "red, new") for n in range(50)
]


def form_of(folder, text, name="interactions"):
    return find_form(write(folder / "log.txt", text), TableConfig(), name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "::"])
@pytest.mark.parametrize("header", [True, False])
def test_delimiter_and_header_are_found(tmp_path, delimiter, header):
    width = 3 if delimiter == "," else 4
    lines = [delimiter.join(row[:width]) for row in ROWS]
    if header:
        lines.insert(0, delimiter.join(["kto", "co", "kiedy", "opis"][:width]))
    form = form_of(tmp_path, "\n".join(lines) + "\n")
    assert (form.source, form.config.delimiter) == ("csv", delimiter)
    names = () if header else ("column_1", "column_2", "column_3", "column_4")[:width]
    assert form.config.names == names


@pytest.mark.parametrize(
    "text, source, options",
    [
        ("1 2\n3 4\n" * 20, "csv", {"delimiter": "whitespace"}),
        ("7   9   5\n8 9 1\n" * 20, "csv", {"delimiter": "whitespace"}),
        ("user item\n3 4\n", "csv", {"delimiter": "whitespace", "names": ()}),
        ("milk,bread\nbread\nmilk,salt,bread\n", "baskets", {}),
        ("bread\nmilk,bread\nmilk,salt,bread,jam\n", "baskets", {"skip_lines": 0}),
        ("".join(f"{n} {' '.join(map(str, range(n % 7)))}\n" for n in range(40)), "user_lists", {}),
        ("u1 7 8 9\nu2 7\nu3 9 8\nu4 7 8 9 7\n", "user_lists", {"delimiter": ","}),
        ("# by hand\nuser,item\n1,2\n", "csv", {"comment": "#", "delimiter": ","}),
        ("sep=;\nuser;item\n1;2\n", "csv", {"delimiter": ";", "names": ()}),
        ('user,text\n1,"a\nb, c\nd"\n2,"x\n\ny"\n', "csv", {"delimiter": ",", "names": ()}),
    ],
)
def test_other_forms_are_found(tmp_path, text, source, options):
    form = form_of(tmp_path, text)
    assert form.source == source
    assert {name: getattr(form.config, name) for name in options} == options


def test_what_the_caller_gives_is_left_alone(tmp_path):
    path = write(tmp_path / "log.txt", "u1 i1\nu2 i2\n")
    config = TableConfig(names=("user_id",), delimiter="\t")
    assert find_form(path, config, "interactions").config == TableConfig(
        path=path, names=("user_id",), delimiter="\t"
    )


def test_attributes_are_a_table_however_ragged(tmp_path):
    text = "".join(f"i{n},{','.join('x' * (n % 5 + 1))}\n" for n in range(30))
    assert form_of(tmp_path, text).source != "csv"
    assert form_of(tmp_path, text, name="items").source == "csv"
