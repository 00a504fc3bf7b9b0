"""What was shown: written beside the requests, joined with what came of it."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.serving.asking import TOKENS, ask, make_app, post, send
from twotower.commands.serving import impressions as command
from twotower.core.errors import ConfigError
from twotower.serving.events import EventLog, StoredEvent
from twotower.serving.impressions import log as log_module
from twotower.serving.impressions.log import SCHEMA, ImpressionLog, read_impressions
from twotower.serving.impressions.rows import join_events, read_events, training_rows
from twotower.serving.types import Answer, Item


def answer(number, items=("a", "b", "c")):
    made = [Item(item, 1.0, "model", {}, propensity=0.5, best=False) for item in items]
    return Answer(f"r{number}", "v1", made)


@pytest.fixture
def log(tmp_path):
    made = ImpressionLog(tmp_path / "shown", seconds=1e6)
    yield made
    made.close()


def test_every_item_that_is_shown_is_a_row(retriever, tmp_path, log):
    app = make_app(retriever, tmp_path, impressions=log)
    user = retriever.bundle.users["user_id"][0].as_py()
    body = {"k": 3, "offset": 2, "explore": 0.5, "seed": 3}
    shown = post(app, "retrieve", user_id=user, **body)
    post(app, "popular/batch", requests=[{"k": 2}, {"k": 1}])
    post(app, "encode_user", user_id=user)
    log.close()
    table = read_impressions(tmp_path / "shown")
    assert table.schema == SCHEMA and len(table) == 3 + 2 + 1
    rows = table.to_pylist()
    assert [row["position"] for row in rows] == [3, 4, 5, 1, 2, 1]
    for row, item in zip(rows, shown["items"]):
        assert row["recommendation_id"] == shown["recommendation_id"]
        assert row["user_id"] == user and row["model_version"] == shown["model_version"]
        assert row["item_id"] == item["item_id"] and row["source"] == item["source"]
        assert row["propensity"] == pytest.approx(item.get("propensity", 1.0))
        assert row["best"] == item.get("best", True)
    assert rows[-1]["user_id"] is None and rows[-1]["source"] == "popular"


def test_a_damaged_file_keeps_a_user_in_no_other_file(retriever, tmp_path, log):
    log.add("u1", str, 0, answer(1))
    log.flush()
    (log.folder / "impressions-0.parquet").write_bytes(b"half a file")
    app = make_app(retriever, tmp_path, tokens={"change": TOKENS["change"]}, impressions=log)
    token = {"headers": {"x-api-key": TOKENS["change"]}}
    response = ask(app, "POST", "/v1/erase_user", {"user_id": "u1"}, **token)
    assert response.status_code == 503 and "log names" in response.json()["cure"]
    (log.folder / "impressions-0.parquet").unlink()
    assert not len(read_impressions(log.folder))


def test_two_users_who_are_erased_at_once_both_stay_away(log):
    for user in ("u1", "u2", "u3"):
        log.add(user, str, 0, answer(1))
    log.flush()
    has_read = threading.Barrier(2)
    read_file = pq.ParquetFile

    class Slow:
        """A file that is read by two, where two may read at once, before either writes."""

        def __init__(self, path):
            self.file = read_file(path)

        def read(self, columns=None):
            with contextlib.suppress(threading.BrokenBarrierError):
                has_read.wait(0.05)
            return self.file.read(columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module.pq, "ParquetFile", Slow)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            assert list(pool.map(log.erase, ("u1", "u2"))) == [3, 3]
    assert set(read_impressions(log.folder)["user_id"].to_pylist()) == {"u3"}


def test_a_user_who_is_erased_leaves_nothing_behind(retriever, tmp_path, log):
    """Neither in the memory of any server of the events, nor in a byte of a file."""
    app = make_app(retriever, tmp_path, tokens={"change": TOKENS["change"]}, impressions=log)
    other = make_app(retriever, tmp_path)
    item = retriever.items()["item_id"][0].as_py()
    users = ["somebody-to-forget", "somebody-else"]
    events = [{"event_id": f"e-{user}", "user_id": user, "item_id": item} for user in users]

    async def ask():
        token = {"headers": {"x-api-key": TOKENS["change"]}}
        await send(app, "POST", "/v1/events", {"events": events}, **token)
        await other.writer.follow()
        for user in users:
            await send(app, "POST", "/v1/retrieve", {"user_id": user, "k": 3}, **token)
        await asyncio.to_thread(log.flush)
        # Shown, and not written yet.
        await send(app, "POST", "/v1/retrieve", {"user_id": users[0], "k": 2}, **token)
        erased = await send(app, "POST", "/v1/erase_user", {"user_id": users[0]}, **token)
        again = await send(app, "POST", "/v1/erase_user", {"user_id": users[0]}, **token)
        await other.writer.follow()
        return erased.json(), again.json()

    assert asyncio.run(ask()) == (
        {"events": 1, "impressions": 5},
        {"events": 0, "impressions": 0},
    )
    for server in (app, other):
        assert server.answers.histories.last(users[0]) is None
        assert server.answers.histories.last(users[1])["item_id"] == item
        assert len(server.answers.histories) == 1
    assert set(read_impressions(tmp_path / "shown")["user_id"].to_pylist()) == {users[1]}
    files = [*(tmp_path / "shown").iterdir(), tmp_path / "events"]
    assert all(users[0].encode() not in path.read_bytes() for path in files)


def test_the_folder_has_a_bounded_size_and_the_newest_rows(tmp_path, monkeypatch):
    folder = tmp_path / "shown"
    monkeypatch.setattr(log_module, "MAX_ROWS", 3)
    monkeypatch.setattr(log_module, "LOOK_SECONDS", 1e6)
    log = ImpressionLog(folder)
    for number in range(5):
        log.add("u", str, 0, answer(number))
    log._take()
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert len(sizes) == 5
    log._bytes = sum(sizes[:3])
    log.add("u", str, 0, answer(5))
    log.close()
    ids = read_impressions(folder)["recommendation_id"].unique().to_pylist()
    assert ids == ["r3", "r4", "r5"] or ids == ["r4", "r5"]


def test_answers_beyond_what_may_wait_are_counted_as_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "MAX_WAITING", 2)
    monkeypatch.setattr(log_module, "LOOK_SECONDS", 1e6)
    log = ImpressionLog(tmp_path / "shown")
    for number in range(3):
        log.add("u", str, 0, answer(number))
    log.close()
    assert log.lost == 1 and len(read_impressions(tmp_path / "shown")) == 6


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), pa.ArrowMemoryError("malloc failed")]
)
def test_a_disk_or_memory_that_refuses_costs_the_rows_alone(tmp_path, monkeypatch, error):
    monkeypatch.setattr(log_module, "LOOK_SECONDS", 1e6)
    log = ImpressionLog(tmp_path / "shown")

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(pq, "write_table", refuse)
    log.add("u", str, 0, answer(1))
    log.close()
    assert log.lost == 1 and not list((tmp_path / "shown").iterdir())


def test_folders_that_hold_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="twotower serve --impressions"):
        read_impressions(tmp_path)
    (tmp_path / "impressions-x.parquet").write_text("none")
    with pytest.raises(ConfigError, match="Move it away"):
        read_impressions(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--impressions=.*/file cannot be written to"):
        ImpressionLog(tmp_path / "file")
    with pytest.raises(ConfigError, match="--events"):
        read_events(tmp_path / "none")
    with pytest.raises(ConfigError, match="no events of a server"):
        read_events(tmp_path / "file")


@dataclasses.dataclass
class Drawn:
    impressions: pa.Table
    events: list[StoredEvent]


def draw(rng, lists=80, events=120):
    """Lists of three items to few users, and events with and without the id of a list."""
    columns = {name: [] for name in ("recommendation_id", "time", "user_id", "item_id", "position")}
    for number in range(lists):
        user = str(rng.choice(["u1", "u2", "u3"])) if rng.random() < 0.9 else None
        items = rng.choice(list("abcdef"), 3, replace=False).tolist()
        columns["recommendation_id"] += [f"r{number}"] * 3
        columns["time"] += [int(1e6 * rng.integers(1_000))] * 3
        columns["user_id"] += [user] * 3
        columns["item_id"] += items
        columns["position"] += [1, 2, 3]
    columns["propensity"] = [0.5] * len(columns["time"])
    sent = []
    for number in range(events):
        named = f"r{rng.integers(lists + 9)}" if rng.random() < 0.4 else None
        user = str(rng.choice(["u1", "u2", "u3", "u4"]))
        item = str(rng.choice(list("abcdefg")))
        kind = str(rng.choice(["click", "purchase"]))
        time = int(rng.integers(1_200))
        sent.append(StoredEvent(str(number), user, item, kind, time, named))
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    return Drawn(pa.table(columns, schema), sent)


def expected_labels(drawn, seconds, kinds):
    rows = drawn.impressions.to_pylist()
    times = drawn.impressions["time"].cast(pa.int64()).to_numpy() / 1e6
    labels = [0] * len(rows)
    for event in drawn.events:
        if kinds and event.event not in kinds:
            continue
        matches = []
        for number, row in enumerate(rows):
            if row["item_id"] != event.item_id:
                continue
            if event.recommendation_id is not None:
                if row["recommendation_id"] == event.recommendation_id:
                    labels[number] = 1
            elif row["user_id"] == event.user_id:
                if times[number] <= event.timestamp + 1 <= times[number] + seconds + 1:
                    matches.append((times[number], number))
        if matches:
            last = max(time for time, _ in matches)
            # Of several lists in one second either may be meant.
            labels[max(number for time, number in matches if time == last)] = 1
    return labels


@pytest.mark.parametrize("kinds", [(), ("purchase",)])
def test_labels_are_those_of_a_plain_search(tmp_path, kinds):
    drawn = draw(np.random.default_rng(0))
    log = EventLog(tmp_path / "events")
    log.add([drawn.events])
    log.close()
    events = read_events(tmp_path / "events")
    labelled = join_events(drawn.impressions, events, kinds=kinds, seconds=100)
    assert labelled["label"].to_pylist() == expected_labels(drawn, 100, kinds)
    assert 0 < sum(labelled["label"].to_pylist()) < len(labelled)
    with pytest.raises(ConfigError, match="did you mean 'click'"):
        join_events(drawn.impressions, events, kinds=["clik"])


def test_training_rows_are_what_users_took_and_left_of_lists_they_saw(tmp_path):
    drawn = draw(np.random.default_rng(1))
    rng = np.random.default_rng(2)
    labels = (rng.random(len(drawn.impressions)) < 0.2).astype(np.int8)
    labelled = drawn.impressions.append_column("label", pa.array(labels))
    rows = training_rows(labelled)
    kept = []
    taken = {row["recommendation_id"] for row in labelled.to_pylist() if row["label"]}
    for row in labelled.to_pylist():
        if row["user_id"] is not None and row["recommendation_id"] in taken:
            kept.append((int(row["time"].timestamp()), row["user_id"], row["item_id"]))
    found = zip(*(rows[name].to_pylist() for name in ("timestamp", "user_id", "item_id")))
    assert sorted(found) == sorted(kept)
    assert rows["timestamp"].to_pylist() == sorted(rows["timestamp"].to_pylist())
    everything = training_rows(labelled, all_lists=True)
    assert len(everything) == len(labelled) - labelled["user_id"].null_count


def test_the_command_writes_rows_and_says_what_other_policies_would_earn(
    served, retriever, tmp_path, log, capsys
):
    app = make_app(retriever, tmp_path, impressions=log)
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    for user in users:
        shown = post(app, "retrieve", user_id=user, k=4)
        event = {"event_id": user, "user_id": user, "item_id": shown["items"][1]["item_id"]}
        event["recommendation_id"] = shown["recommendation_id"]
        post(app, "events", events=[event])
    log.close()
    flags = [f"--impressions={log.folder}", f"--events={tmp_path / 'events'}"]
    command.FLAGS(["impressions", *flags, f"--out={tmp_path / 'rows'}", f"--bundle={served}"])
    command.main()
    printed = capsys.readouterr().out
    assert "12 impressions in 3 lists, 3 events: 3 impressions had one" in printed
    assert f"{served}: 12 effective samples of 12 are below 1,000." in printed
    rows = pq.read_table(tmp_path / "rows").to_pylist()
    assert [row["label"] for row in rows] == [0, 1, 0, 0] * 3
    assert [row["user_id"] for row in rows[::4]] == users


def test_files_of_older_servers_take_the_id_of_a_recommendation(tmp_path):
    path = tmp_path / "events"
    log = EventLog(path)
    log.add([[StoredEvent("e", "u", "i", "click", 5)]])
    log._connection.execute("ALTER TABLE events DROP COLUMN recommendation_id")
    log.close()
    again = EventLog(path)
    again.add([[StoredEvent("f", "u", "i", None, 6, "r1")]])
    again.close()
    assert read_events(path)["recommendation_id"].to_pylist() == [None, "r1"]
