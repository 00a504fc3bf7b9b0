"""A streamed training is that of the same examples in the same order, and goes on where it was."""

import functools
import json

import jax
import numpy as np
import pytest

from tests.extras import extra
from tests.training.shop import TINY_FEATURES, build_trainer, prepared_shop, small_config
from twotower.config import from_dict, non_defaults
from twotower.core.errors import ConfigError
from twotower.core.mesh import make_mesh
from twotower.pipeline.streaming import shards
from twotower.pipeline.streaming.stream import Stream
from twotower.training import loop
from twotower.training.loop import open_checkpoints

extra("grain", "stream")
STEPS = 6


class Ended(Exception):
    pass


@pytest.mark.slow
def test_a_stream_trains_to_the_bits_of_the_host_and_goes_on_at_its_example(
    tmp_path, monkeypatch, caplog
):
    # Three batches and a half are a pass.
    training = {"input": "stream", "batch_size": 680, "steps": STEPS, "validate_every": 2}
    config = small_config(features=TINY_FEATURES, training=training | {"log_every": 1})
    prepared = prepared_shop()
    trainer = build_trainer(prepared, config)
    records = prepared.training_records()
    shards.write(records, tmp_path / "shards")
    open_stream = functools.partial(Stream.open, records, tmp_path / "shards")

    def fit(name, **options):
        given = {"open_stream": open_stream, "mesh": make_mesh(1), "validate": None} | options
        return loop.fit(trainer, prepared, tmp_path / name, **given)

    def end(step, values):
        if step == 4:
            raise Ended

    with caplog.at_level("INFO"):
        streamed = fit("whole")
    assert f"are streamed from {len(records):,} records" in caplog.text
    assert f"This process read {STEPS * 680:,} examples" in caplog.text
    with pytest.raises(Ended):
        fit("ended", on_validation=end)
    with open_checkpoints(tmp_path / "ended", config, read_only=True) as checkpoints:
        assert checkpoints.record(4)["next_example"] == 4 * 680
    resumed = fit("ended")

    def in_its_order(config):
        batches = loop.make_batches(prepared, config)
        count = len(records)
        places = np.arange(count)
        examples = open_stream(config).examples
        monkeypatch.setattr(batches, "_shuffled", lambda n: examples(n * count + places)[0])
        return batches

    gathered = fit("host", open_stream=in_its_order)
    for other in (resumed, gathered):
        jax.tree.map(np.testing.assert_array_equal, other, streamed)
    curves = []
    for name in ("whole", "ended", "host"):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert curves[0] == curves[1] == curves[2] and len(curves[0]) == STEPS


def test_where_batches_come_from_and_why(caplog):
    data = prepared_shop()

    def choose(**training):
        config = small_config(training=training).training
        caplog.clear()
        with caplog.at_level("INFO"):
            batches = loop.make_batches(data, config)
            loop._log_input(config, batches)
        return batches.resident is not None

    assert choose() and "lie on the device, 87.5 KiB: no more than" in caplog.text
    assert not choose(resident_megabytes=0) and "input='stream' reads the part" in caplog.text
    assert choose(resident_megabytes=0, input="resident")
    assert "lie on the device, 87.5 KiB: config.training.input='resident'" in caplog.text
    assert not choose(input="host") and "gathered on the host" in caplog.text


def test_checkpoints_are_those_of_any_input_but_a_stream_whose_order_is_another():
    configs = {
        name: from_dict({"training": {"input": name}}) for name in ("auto", "host", "stream")
    }
    sections = {name: config.training_sections() for name, config in configs.items()}
    assert sections["auto"] == sections["host"]
    changed = non_defaults(sections["stream"], sections["auto"])
    assert changed == {"training": {"input": "stream"}}


def test_steps_of_a_stream_are_not_dispatched_together():
    with pytest.raises(ConfigError, match="steps_per_dispatch=4 must be 0 or 1 with .*'stream'"):
        small_config(training={"input": "stream", "steps_per_dispatch": 4})
