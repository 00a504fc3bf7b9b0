"""What watches a training: the parts of its time, goodput over restarts, stragglers, profiles."""

import contextlib
import functools
import json
import shutil
import time

import numpy as np
import pytest

from tests.training.shop import build_trainer, small_config
from twotower.core.errors import ConfigError
from twotower.core.mesh import make_mesh
from twotower.training.loop import fit
from twotower.training.metrics import read_lines
from twotower.training.monitoring import heartbeat as heartbeat_module
from twotower.training.monitoring.goodput import SPENT, begin, format_ledger, read_ledger
from twotower.training.monitoring.heartbeat import Heartbeat, heartbeat_path, read_heartbeat
from twotower.training.monitoring.monitor import NOT_ASKED, Monitor, Monitoring
from twotower.training.monitoring.phases import PHASES, Phases
from twotower.training.monitoring.profile import parse_steps
from twotower.training.monitoring.rates import Rates, find_kind
from twotower.training.monitoring.report import describe_run, find_run
from twotower.training.monitoring.step_work import with_rates
from twotower.training.monitoring.stragglers import SILENT, Beat, Watcher, find_slowest
from twotower.training.planning.costs import Cost
from twotower.training.planning.peaks import CHIPS


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_phases_add_up_to_all_of_the_time():
    rng = np.random.default_rng(0)
    clock = Clock()
    phases = Phases(clock)
    expected = dict.fromkeys(PHASES, 0.0)
    current = "start"
    for _ in range(200):
        passed = rng.exponential()
        clock.now += passed
        expected[current] += passed
        if rng.random() < 0.5:
            current = str(rng.choice(PHASES))
            phases.switch(current)
            continue
        inner = str(rng.choice(PHASES))
        with contextlib.suppress(KeyError), phases.during(inner):
            clock.now += 2.0
            expected[inner] += 2.0
            # An error ends the phase as well.
            raise KeyError
    assert phases.seconds() == pytest.approx(expected)
    assert sum(phases.seconds().values()) == pytest.approx(clock.now)
    phases.since_last()
    clock.now += 3.0
    assert phases.since_last()[current] == pytest.approx(3.0)


def test_goodput_counts_what_was_computed_again_and_the_time_between_two_starts():
    ledger = begin(now=1000.0).plus({"start": 10.0, "input": 4.0, "compute": 36.0})
    ledger = ledger.saved(20)
    # Ten steps more, which no checkpoint has.
    ledger = ledger.plus({"compute": 20.0, "checkpoint": 5.0})
    assert ledger.goodput == pytest.approx(60 / 75)
    ledger = ledger.restarted(20, away=25.0)
    assert (ledger.starts, ledger.total) == (2, 100.0)
    assert ledger.seconds["lost"] == 20.0
    assert ledger.goodput == pytest.approx(40 / 100)
    # The files hold all of it, and a damaged one is no ledger.
    content = json.loads(json.dumps(ledger.to_json()))
    assert read_ledger(content) == ledger
    for name in ("begun", "seconds", "saves"):
        assert read_ledger(content | {name: None}) is None
    # From the beginning again, everything was lost; a negative gap is the clock's, not ours.
    again = ledger.restarted(0, away=-5.0)
    assert again.goodput == 0 and again.total == 100.0
    assert "lost 60.0 s" in format_ledger(again)


def test_saves_later_than_the_step_gone_back_to_are_forgotten():
    ledger = begin(now=0.0)
    for step in range(300):
        ledger = ledger.plus({"compute": 1.0}).saved(step)
    assert len(ledger.saves) < 300
    back = ledger.restarted(250, away=0.0)
    assert max(back.saves) == 250 and back.seconds["lost"] == 49.0
    assert set(back.seconds) == set(SPENT)


def beat(process, own, waiting, number=0):
    return Beat(process, f"host{process}", number, 7, own, waiting)


def test_the_process_that_the_others_wait_for_is_named_and_no_other():
    rng = np.random.default_rng(0)
    for size in (2, 3, 16):
        own = rng.uniform(0.9e-3, 1.1e-3, size)
        even = [beat(i, x, 10e-3 - x) for i, x in enumerate(own)]
        assert find_slowest(even) is None
        slow = int(rng.integers(size))
        late = [beat(i, x, 30e-3 - x) for i, x in enumerate(own)]
        late[slow] = beat(slow, 20e-3, 10e-3)
        found = find_slowest(late)
        assert found is not None and found.process == slow
    # Twice as long, of a step that takes a thousand times that.
    assert find_slowest([beat(0, 1e-5, 1.0), beat(1, 2e-5, 1.0)]) is None
    assert find_slowest([beat(0, 1.0, 0.0)]) is None


def test_a_process_that_is_silent_is_named_once_by_the_clock_of_the_one_that_looks():
    watcher = Watcher(process=0)
    quiet = [beat(0, 1e-3, 1e-3), beat(1, 1e-3, 1e-3)]
    assert not watcher.look(quiet, now=100.0)
    assert not watcher.look(quiet, now=100.0 + SILENT / 2)
    said = watcher.look(quiet, now=101.0 + SILENT)
    assert said.startswith("Process 1 on host1 has been silent since step 7")
    assert not watcher.look(quiet, now=102.0 + SILENT)
    alive = [quiet[0], beat(1, 1e-3, 1e-3, number=1)]
    assert not watcher.look(alive, now=103.0 + SILENT)


def test_rates_are_shares_of_the_peak_of_one_device():
    chip = CHIPS["ironwood"]
    cost = Cost(flops=chip.flops / 20, moved=chip.bandwidth / 40)
    rates = Rates("ironwood", "bfloat16", cost).of_step(0.1)
    # Two devices a chip: half of the peaks each.
    assert rates["mfu"] == pytest.approx(1.0)
    assert rates["bandwidth"] == pytest.approx(0.5)
    assert rates["bytes_per_second"] == pytest.approx(chip.bandwidth / 4)
    halved = Rates("h200", "float32", Cost(flops=CHIPS["h200"].flops)).of_step(1.0)
    assert halved["mfu"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 MIG 1g.18gb", ""),
        ("NVIDIA B200", "b200"),
        ("TPU v5", "v5p"),
        ("TPU v5 lite", ""),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "ironwood"),
        ("cpu", ""),
    ],
)
def test_peaks_are_found_by_the_name_of_the_devices(name, kind):
    assert find_kind(name) == kind


def test_flags_that_name_no_steps_and_no_kind_are_refused():
    assert parse_steps("") is None and parse_steps("3-3") == (3, 3)
    for text in ("3", "0-4", "5-4", "a-b", "1-2-3"):
        with pytest.raises(ConfigError, match=f"--profile_steps={text} must be"):
            parse_steps(text)
    with pytest.raises(ConfigError, match="--kind"):
        find_kind("cpu", "h20")


def test_the_time_of_a_step_leaves_out_the_first_ones_which_compile(tmp_path):
    clock = Clock()
    phases = Phases(clock)
    heartbeat = Heartbeat(tmp_path, phases, start=0, steps=100)
    for step, wait in ((1, 60.0), (11, 5.0)):
        with phases.during("input"):
            clock.now += 1.0
        clock.now += wait
        phases.switch("compute")
        heartbeat.note(step)
        content = heartbeat._content()
        assert content["step_seconds"] == ({} if step == 1 else {"input": 0.1, "compute": 0.5})
    assert content["seconds"]["start"] == 60.0


@pytest.mark.slow
def test_a_training_keeps_its_goodput_over_restarts_and_a_profile_changes_no_bit(
    prepared, tmp_path
):
    class Stopped(Exception):
        pass

    def train(until, monitoring=NOT_ASKED):
        def stop(step, values):
            if step == until:
                raise Stopped

        config = small_config(training={"steps": 6, "validate_every": 2, "log_every": 2})
        trainer = build_trainer(prepared, config)
        monitoring = with_rates(monitoring, trainer, prepared, make_mesh(1))
        with contextlib.suppress(Stopped):
            watch = functools.partial(Monitor, tmp_path, monitoring, Phases())
            fit(trainer, prepared, tmp_path, validate=None, on_validation=stop, open_watch=watch)
        return read_heartbeat(tmp_path)

    first = train(4, Monitoring(kind="h200"))
    assert (first["state"], first["step"], first["starts"]) == ("stopped", 4, 1)
    assert list(first["saves"]) == ["2", "4"]
    assert 0 < first["goodput"] < 1 and 0 < first["rates"]["mfu"] < 1
    (line,) = [line for line in read_lines(tmp_path) if line["step"] == 4]
    assert line["step_seconds/compute"] > 0 and line["goodput"] > 0
    assert line["bytes_per_second"] == pytest.approx(line["bandwidth"] * CHIPS["h200"].bandwidth)
    told = "\n".join(describe_run(tmp_path))
    assert "step 4 of 6" in told and "Goodput" in told and "MFU 0." in told
    # As a process that was killed between two checkpoints leaves it.
    path = heartbeat_path(tmp_path)
    killed = first | {"state": "training", "time": time.time() - 50}
    killed["seconds"]["compute"] += 30
    path.write_text(json.dumps(killed))
    second = train(0)
    assert (second["state"], second["step"], second["starts"]) == ("ended", 6, 2)
    assert "MFU -" in "\n".join(describe_run(tmp_path))
    assert 30 <= second["seconds"]["lost"] < 31 and second["seconds"]["away"] >= 50
    losses = [line["loss"] for line in read_lines(tmp_path)]
    # Once more from step 4, with a heartbeat that was damaged.
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    path.write_text("{")
    assert train(0, Monitoring(profile_steps=(5, 5)))["starts"] == 1
    assert [line["loss"] for line in read_lines(tmp_path)] == losses
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert trace.stat().st_size > 1000


def test_a_heartbeat_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(heartbeat_module.logging, "warning", lambda *words: said.append(words))
    folder = tmp_path / "file"
    folder.write_text("no folder")
    with Heartbeat(folder, Phases(), start=0, steps=1) as heartbeat:
        heartbeat.note_save(1)
    (words,) = [words for words, *_ in said if "cannot be written" in words]
    assert words.startswith("The heartbeat")


@pytest.mark.parametrize(
    "damage",
    [{"time": None}, {"time": "now"}, {"time": float("nan")}, {"steps": None}, {"beat": 1e300}],
)
def test_a_damaged_heartbeat_is_none_and_never_ends_a_training(tmp_path, damage):
    beat = {name: 1 for name in ("beat", "step", "steps", "process", "processes")}
    content = beat | {"time": time.time(), "step_seconds": {}, "host": "", "pid": 1}
    content |= begin(time.time() - 50).plus({"compute": 50.0}).to_json()
    heartbeat_path(tmp_path).write_text(json.dumps(content))
    assert Heartbeat(tmp_path, Phases(), start=0, steps=9).ledger.starts == 2
    heartbeat_path(tmp_path).write_text(json.dumps(content | damage))
    assert Heartbeat(tmp_path, Phases(), start=0, steps=9).ledger.starts == 1
    assert "without a heartbeat" in next(describe_run(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1"])
def test_a_ledger_of_no_time_is_none(value):
    content = begin(1000.0).plus({"compute": 36.0}).saved(3).to_json()
    assert read_ledger(content | {"begun": value}) is None
    assert read_ledger(content | {"seconds": content["seconds"] | {"input": value}}) is None
    assert read_ledger(content | {"saves": {"3": {"input": 1.0, "compute": value}}}) is None


def test_the_time_of_a_step_that_never_ended_is_counted(tmp_path, monkeypatch):
    clock = Clock()
    # All clocks alike: those of the machine, and that of the phases.
    monkeypatch.setattr(heartbeat_module.time, "time", lambda: 5000.0 + clock.now)
    monkeypatch.setattr(heartbeat_module.time, "monotonic", clock)
    first = Heartbeat(tmp_path, Phases(clock), start=0, steps=9)
    clock.now = 30.0
    first.note(2)
    # A step that hangs: its heartbeat goes on until the process is killed.
    clock.now = 630.0
    first._write()
    clock.now = 640.0
    second = Heartbeat(tmp_path, Phases(clock), start=0, steps=9)
    assert second.ledger.total == pytest.approx(640.0)
    assert second.ledger.seconds["away"] == pytest.approx(610.0)


@pytest.mark.parametrize("version", ["", "v-3"])
def test_a_bundle_is_no_run(tmp_path, version):
    folder = tmp_path / version
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"training": {}}')
    assert find_run(str(folder)) == folder
    (folder / "manifest.json").write_text('{"format": "twotower-bundle"}')
    if version:
        (tmp_path / "current").write_text("v-3\n")
        assert not (tmp_path / "config.json").exists()
    for path in {folder, tmp_path}:
        with pytest.raises(ConfigError, match="is a bundle, and neither a log nor the folder of a"):
            find_run(str(path))
