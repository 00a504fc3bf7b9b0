"""Streams of records: the batches of the whole log, each example once a pass, on any number of
processes."""

import json
import sys

import jax
import numpy as np
import pytest

from tests.extras import extra
from tests.pipeline.history_log import LEAKS, prepare_log, write_log
from twotower.config import from_dict
from twotower.core.errors import ConfigError, FolderError
from twotower.pipeline import folder as data_folder
from twotower.pipeline.batches import InteractionExamples, InteractionRows, join_parts
from twotower.pipeline.engines.engine import prepare_folder
from twotower.pipeline.sequences import SequenceExamples, SequencePacking
from twotower.pipeline.streaming import shards
from twotower.pipeline.streaming.order import shuffled
from twotower.pipeline.streaming.prepared import write_shards
from twotower.pipeline.streaming.records import RowRecords, SequenceRecords
from twotower.pipeline.streaming.shards import Shards
from twotower.pipeline.streaming.stream import Stream

extra("grain", "stream")
N = 100
B = 12


@pytest.mark.parametrize("count", [1000, 70_000, 2**20, 3_000_000_000])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_order_is_that_of_grain(count, seed):
    from grain.experimental import index_shuffle

    positions = np.append(np.random.default_rng(0).integers(0, count, 30), count - 1)
    expected = [index_shuffle(int(x), count - 1, seed, 4) for x in positions]
    np.testing.assert_array_equal(shuffled(positions, count, seed), expected)


@pytest.mark.parametrize("count", [1, 3, 1000, 2**16 + 1])
def test_a_pass_has_every_example_once(count):
    order = shuffled(np.arange(count), count, seed=7)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def drawn_rows():
    rng = np.random.default_rng(0)
    return InteractionRows(
        user=rng.integers(0, 11, N).astype(np.int32),
        item=np.arange(N, dtype=np.int32),
        weight=rng.random(N, np.float32),
        timestamp=None,
        context={"hour/of day": rng.integers(0, 24, (N, 2)).astype(np.int16)},
        labels={"clicked": rng.choice(np.float32([0, 1, np.nan]), N)},
    )


FEATURES = {"user": {"id": np.arange(11) + 100}, "item": {"words": np.ones((N, 3), np.int32)}}


def write_and_open(records, folder, **options):
    shards.write(records, folder, **options)
    return Shards(folder, records)


def make_stream(folder, batch_size=B):
    records = RowRecords(drawn_rows(), FEATURES)
    return Stream(records, write_and_open(records, folder), batch_size, seed=3)


def check_batches(records, examples, folder):
    """The batches of a stream are those that are gathered of the whole log."""
    stream = Stream(records, write_and_open(records, folder, file_bytes=500), 5, seed=1)
    for step in (0, 1, 2 * len(records) // 5 + 1):
        positions = np.arange(5 * step, 5 * step + 5)
        index = examples.index(*stream.examples(positions))
        batch = stream.load(positions)
        expected = examples.gather(examples.data, index)
        jax.tree.map(np.testing.assert_array_equal, batch, expected)
        types = [jax.tree.map(lambda x: x.dtype, tree) for tree in (batch, expected)]
        assert types[0] == types[1]


def test_rows_with_context_and_labels_are_those_of_the_log(tmp_path):
    rows = drawn_rows()
    check_batches(RowRecords(rows, FEATURES), InteractionExamples(rows, FEATURES), tmp_path)


@pytest.mark.parametrize("times", [None, 30], ids=["no times", "ties and gaps"])
def test_histories_and_packed_sequences_are_those_of_the_log(tmp_path, times):
    history = {"gaps": 5, "request_gap": True} if times else {}
    path = write_log(tmp_path / "log.csv", times=times)
    prepared = prepare_log(path, {"kind": "random"}, **history)
    parts = (prepared.train, prepared.features, prepared.histories)
    check_batches(RowRecords(*parts), InteractionExamples(*parts), tmp_path / "rows")
    for crop in ("last", "random"):
        packing = SequencePacking.build(prepared.histories, crop=crop, seed=1)
        records = SequenceRecords(*parts, packing)
        check_batches(records, SequenceExamples(*parts, packing), tmp_path / crop)


def test_histories_one_after_the_other_are_those_of_the_log(tmp_path):
    path = write_log(tmp_path / "log.csv", times=30)
    prepared = prepare_log(path, {"kind": "random"}, gaps=5, request_gap=True)
    parts = (prepared.train, prepared.features, prepared.histories)
    records = RowRecords(*parts)
    examples = InteractionExamples(*parts)
    stream = Stream(records, write_and_open(records, tmp_path / "shards"), 6, seed=1)
    positions = np.arange(12)
    numbers, _ = stream.examples(positions)
    lengths = examples.span_lengths(numbers).reshape(2, 3, 2).sum(2).max(1)
    # The one batch has room in the usual places, the other takes twice as many.
    capacity = int(lengths.min())
    assert capacity < lengths.max() <= 2 * capacity
    loaded = stream.load_parts(positions, event_capacity=capacity, batches=2, parts=3)
    for batch, own, most in zip(loaded, np.split(numbers, 2), lengths):
        gathered = []
        for part in np.split(own, 3):
            size = capacity * (1 + (most > capacity))
            gathered.append(examples.gather_spans(examples.data, part, size))
        jax.tree.map(np.testing.assert_array_equal, batch, join_parts(gathered))
    options = {"part": slice(0, 6), "event_capacity": capacity, "devices": 3}
    with stream.batches(0, 2, **options) as read:
        jax.tree.map(np.testing.assert_array_equal, list(read), loaded)


def test_four_processes_then_two_three_and_four_go_on_at_the_very_example(tmp_path):
    whole = make_stream(tmp_path)
    next_example = 0
    seen = []
    for processes, steps in ((4, 3), (2, 5), (3, 9), (4, 8)):
        size = B // processes
        read = []
        for process in range(processes):
            stream = make_stream(tmp_path)
            part = slice(process * size, (process + 1) * size)
            with stream.batches(next_example, steps, part=part) as batches:
                read.append([batch["item"] for batch in batches])
            # Its own part of each batch and no record more, though threads read ahead.
            assert stream.shards.records_read == steps * size
            assert stream.shards.bytes_read == steps * size * stream.records.layout.head.itemsize
        joined = np.concatenate(read, axis=1)
        positions = np.arange(next_example, next_example + steps * B)
        np.testing.assert_array_equal(joined.ravel(), whole.load(positions)["item"])
        seen.append(joined.ravel())
        next_example += steps * B
    passes = np.concatenate(seen).reshape(3, N)
    assert (np.sort(passes) == np.arange(N)).all()
    assert not (passes[0] == passes[1]).all()


def test_the_rows_of_a_batch_go_to_the_devices_in_the_threads(tmp_path):
    stream = make_stream(tmp_path)
    with stream.batches(0, 2, part=slice(0, B), put=jax.device_put) as batches:
        assert isinstance(next(batches)["weight"], jax.Array)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size=200 is larger .* 100 training rows"):
        make_stream(tmp_path, batch_size=200)


def test_processes_write_together_and_a_killed_write_goes_on(tmp_path):
    records = RowRecords(drawn_rows(), FEATURES)
    for part in (1, 0):
        shards.write(records, tmp_path, part=part, parts=2, file_bytes=500)
    assert not shards.is_whole(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 2
    files[1].unlink()
    kept = files[0].stat().st_ino
    opened = write_and_open(records, tmp_path, file_bytes=500)
    assert files[0].stat().st_ino == kept and opened.num_files == len(files)
    numbers = np.array([99, 0, 99, 50])
    encoded = [records.encode(n, n + 1).content.tobytes() for n in numbers]
    assert opened.read(numbers) == encoded


@pytest.mark.parametrize(
    ("files", "field"),
    [
        (None, "files=None is no list"),
        ({"0": 1}, "files={.*} is no list"),
        (["a"], r"files\[0\].file=None is not"),
        ([{"file": "../x", "records": 100, "bytes": 1}], r"files\[0\].file='../x' is not"),
        ([{"file": "00000.array_record", "records": True, "bytes": 1}], r"files\[0\].records=True"),
        ([{"file": "00000.array_record", "records": 100}], r"files\[0\].bytes=None"),
        ([{"file": "00000.array_record", "records": 99, "bytes": 1}], "files have 99 records"),
    ],
)
def test_a_manifest_that_was_changed_by_hand_is_refused_by_its_field(tmp_path, files, field):
    records = RowRecords(drawn_rows(), FEATURES)
    manifest = {"version": shards.VERSION, "layout": records.layout.describe(), "records": 100}
    if files is not None:
        manifest["files"] = files
    (tmp_path / shards.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FolderError, match=rf"shards.json: {field}"):
        Shards(tmp_path, records)


def test_files_that_are_missing_cut_or_damaged_are_named(tmp_path):
    records = RowRecords(drawn_rows(), FEATURES)
    opened = write_and_open(records, tmp_path)
    path = tmp_path / "00000.array_record"
    content = path.read_bytes()
    record = records.encode(7, 8).content.tobytes()
    path.write_bytes(content.replace(record, b"x" * len(record)))
    with pytest.raises(FolderError, match="00000.array_record is damaged"):
        opened.read(np.array([7]))
    path.write_bytes(content[:-1])
    with pytest.raises(FolderError, match="is cut: it has"):
        Shards(tmp_path, records)
    path.unlink()
    with pytest.raises(FolderError, match="is missing"):
        Shards(tmp_path, records)
    with pytest.raises(FolderError, match="holds other records than this run reads"):
        Shards(tmp_path, RowRecords(drawn_rows().take(np.arange(9)), FEATURES))


def test_a_stream_without_its_extra_is_refused_before_the_log_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    config = from_dict({"training": {"input": "stream"}})
    with pytest.raises(ConfigError, match=r"input='stream' needs the extra 'stream' .*\[stream\]"):
        prepare_folder(config, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_prepared_data_of_a_stream_has_its_shards_whichever_training_made_them(tmp_path):
    path = write_log(tmp_path / "log.csv")
    feature = {"type": "string", "embedding_size": 4}
    values = {
        "data": {"source": "csv", "path": str(path)},
        "split": {"kind": "random", "accept_leakage": LEAKS},
        "features": {"user": {"user_id": feature}, "item": {"item_id": feature}},
        "training": {"input": "stream", "batch_size": 8},
    }
    folder = tmp_path / "data"
    for seed in (0, 1):
        values["training"]["seed"] = seed
        prepare_folder(from_dict(values), folder)
        # The order of the stream is no part of its records.
        (written,) = (folder / "shards").iterdir()
    config = from_dict(values)
    prepared = data_folder.load(folder, config, data_folder.load_encoder(folder))
    assert write_shards(prepared, folder) == written
    stream = Stream.open(prepared.training_records(), written, config.training)
    batch = stream.load(np.arange(len(prepared.train)))
    np.testing.assert_array_equal(np.sort(batch["item"]), np.sort(prepared.train.item))
    # Those of other data are deleted, finished or not; those of another packing are not.
    made_from = json.loads((written / "made_from.json").read_text())
    for name, content in (("gone", "other"), ("packing", made_from["content"])):
        (folder / "shards" / name).mkdir()
        record = json.dumps(made_from | {"content": content, "seed": 7})
        (folder / "shards" / name / "made_from.json").write_text(record)
        (folder / "shards" / name / "00000.array_record").write_bytes(b"")
    prepare_folder(config, folder)
    assert {path.name for path in (folder / "shards").iterdir()} == {written.name, "packing"}
