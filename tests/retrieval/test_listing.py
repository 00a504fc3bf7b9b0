"""Files of users, and tables that line up."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wcwidth import wcswidth

from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm
from twotower.core.tables import shorten
from twotower.retrieval.batch.listing import ListOptions, format_items, read_ids, write_lists
from twotower.retrieval.retriever import Recommendation


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"", "cannot be read: is empty"),
        ("a.parquet", b"nonsense", "cannot be read: .*Parquet"),
        ("a.txt", "Jos\u00e9".encode("latin-1"), "cannot be read: .*utf-8"),
        ("a.csv", b"user_id\n", "cannot be read: has no rows"),
        ("a.csv", b"user_id,user_id\n1,2\n", "cannot be read: has several columns named"),
        ("a.txt", b"\n", "holds no user id"),
    ],
)
def test_a_file_without_ids_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--users=.*{name} {message}"):
        read_ids(tmp_path / name)


def test_ids_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.csv").write_text("name,user_id\nx,007\ny,8\n")
    (tmp_path / "a.txt").write_text("user_id\n007\n8\n")
    pq.write_table(pa.table({"user_id": [7, 8]}), tmp_path / "a.parquet")
    assert read_ids(tmp_path / "a.csv") == read_ids(tmp_path / "a.txt") == ["007", "8"]
    assert read_ids(tmp_path / "a.parquet") == ["7", "8"]
    (tmp_path / "b.csv").write_text("user\n1\n")
    with pytest.raises(ConfigError, match="no column 'user_id'; it has: user"):
        read_ids(tmp_path / "b.csv")


def test_a_table_lines_up_in_any_script():
    items = [
        Recommendation("1", 0.5, {"title": "نص", "tags": ["a", "b"]}),
        Recommendation("22", -0.25, {"title": "日本", "tags": None}),
        Recommendation("3", 0.125, {"title": "x" * 99, "tags": []}),
    ]
    lines = format_items(items).splitlines()
    assert len({wcswidth(line) for line in lines}) == 1
    assert (
        "a, b" in lines[1]
        and "…" in lines[3]
        and lines[0].split() == ["rank", "item", "title", "tags", "score"]
    )
    assert format_items([]) == "  (nothing)"


def test_titles_and_names_stand_first_and_short():
    display = {"shelf": "a", "Name": "n" * 50, "price": 2.0, "title": "t"}
    header, row = format_items([Recommendation("i1", 0.5, display)]).splitlines()
    assert header.split() == ["rank", "item", "title", "Name", "shelf", "price", "score"]
    assert "n" * 38 in row and "n" * 41 not in row


def test_a_table_lines_up_whatever_is_in_a_cell():
    """Line breaks, tabs, control characters, wide letters, marks without a width, long texts."""
    texts = [
        "a\nb",
        "a\tb",
        "a\x00\x1b[31mb",
        "日本" * 60,
        "e\u0301" * 500,
        "x" * 10_000,
        "👩‍👩‍👧",
        "",
    ]
    items = [Recommendation(str(n), 0.5, {"title": text}) for n, text in enumerate(texts)]
    lines = format_items(items).splitlines()
    assert len(lines) == len(texts) + 1
    assert len({wcswidth(line) for line in lines}) == 1
    assert all(wcswidth(line) < 80 for line in lines)


@pytest.mark.parametrize("text", ["a" * 99, "日本" * 99, "e\u0301" * 99, "a\n" * 99])
def test_a_text_is_cut_to_its_width_on_the_terminal(text):
    short = shorten(text, 10)
    assert short.endswith("…") and 9 <= wcswidth(short) <= 10
    assert shorten("日本", 4) == "日本"


def test_ids_of_users_are_read_in_the_form_of_the_log(tmp_path):
    """Floats, spaces, blank rows, byte order marks, tabs and JSON lines."""
    texts = {
        "floats.csv": "user_id\n3.0\n4.0\n",
        "spaces.csv": "user_id, x\n 3, 1\n 4, 2\n",
        "blank.csv": "user_id,x\n3,1\n,2\n4,3\n",
        "tabs.tsv": "user_id\tname\n3\tx\n4\ty\n",
        "semicolons.txt": "user_id;x\n3;1\n4;2\n",
        "lines.jsonl": '{"user_id": 3}\n{"user_id": "4"}\n',
        "mark.txt": "\ufeffuser_id\n3\n\n 4\n",
        "plain.txt": "3\n4",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    pq.write_table(pa.table({"user_id": [3.0, None, 4.0]}), tmp_path / "floats.parquet")
    for name in (*texts, "floats.parquet"):
        assert read_ids(tmp_path / name, IdForm.DIGITS) == ["3", "4"], name
    pq.write_table(pa.table({"user_id": [b"3"]}), tmp_path / "bytes.parquet")
    with pytest.raises(ConfigError, match="bytes.parquet, column 'user_id': it holds bytes"):
        read_ids(tmp_path / "bytes.parquet", IdForm.DIGITS)


@pytest.mark.slow
def test_lists_for_strangers_are_not_written_unasked(retriever, tmp_path):
    known = retriever.bundle.users["user_id"][0].as_py()
    (tmp_path / "users.txt").write_text(f"{known}\nx\ny\n")
    files = (retriever, tmp_path / "users.txt", tmp_path / "out.parquet", ListOptions(k=2))
    with pytest.raises(
        ConfigError, match="2 of 3 users are not known, such as 'x'.*unmatched_users"
    ):
        write_lists(*files)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(ConfigError, match="--accept='unmatched'.*did you mean 'unmatched_users'"):
        write_lists(*files, accept=["unmatched"])
    said = write_lists(*files, accept=["unmatched_users"])
    assert "3 users (2 of them not known)" in said
    assert pq.read_table(tmp_path / "out.parquet")["user_id"].to_pylist()[::2] == [known, "x", "y"]


# Run as a command: in a process of tests everything is loaded already.
QUERY = """
import sys
sys.argv = ["twotower query", "--bundle={bundle}", "--user={user}", "--k=3"]
from twotower.commands import launch, query
try:
    launch.run(query)
finally:
    heavy = ("flax", "optax", "orbax", "scipy", "twotower.training", "twotower.towers")
    # Before version 26 Arrow itself loads pandas, where it is installed.
    if int(sys.modules["pyarrow"].__version__.split(".")[0]) >= 26:
        heavy += ("pandas",)
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, loaded
"""


def test_a_query_of_a_known_user_loads_nothing_that_trains(exported, retriever):
    user = retriever.bundle.users["user_id"][0].as_py()
    code = QUERY.format(bundle=exported, user=user)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = retriever.recommend(user, k=3)[0].item_id
    assert best in done.stdout
