"""The loop: traced once, resumed to the same bits, stopped in time, never silent about NaN."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from tests.training.shop import build_trainer, make_batches, small_config
from twotower.config import non_defaults
from twotower.core.errors import (
    CheckpointError,
    ConfigError,
    PreemptedError,
    ScoreError,
    TrainingError,
)
from twotower.core.mesh import compiler_options, make_mesh
from twotower.kernels import dense
from twotower.retrieval import embed
from twotower.retrieval.embed import embed_rows
from twotower.towers.tower import arithmetic_type
from twotower.training import checks, loop, run
from twotower.training.checkpoint import best_step
from twotower.training.init import init_on
from twotower.training.loop import EarlyStopping, open_checkpoints
from twotower.training.optimizers import Optimizers
from twotower.training.state import resolve_kinds

pytestmark = pytest.mark.slow

# On one device, which compiles soonest; test_mesh.py has several.
ONE = make_mesh(1)
fit = functools.partial(loop.fit, mesh=ONE)
train = functools.partial(run.train, devices=1)


def _by_norm(weights):
    """A validation metric that any change of the weights changes."""
    return {"recall@10": float(sum(abs(x).sum() for x in jax.tree.leaves(weights)))}


def _equal_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_step_is_traced_once_and_metrics_are_written(
    prepared, tmp_path, monkeypatch, own_programs
):
    traces = []
    plain = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: traces.append(1) or plain(*a, **k))
    fit(build_trainer(prepared, small_config()), prepared, tmp_path, validate=_by_norm)
    assert len(traces) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "validation/recall@10" in line] == [4, 8, 12]
    assert all(line["examples_per_second"] > 0 for line in lines if "loss" in line)
    assert lines[-1]["step"] == 12
    assert list((tmp_path / "tensorboard").iterdir())


def test_steps_are_in_proportion_to_the_examples_that_they_are_meant_for(prepared, tmp_path):
    rows = prepared.num_examples
    as_given = build_trainer(prepared, small_config())  # 12 steps, validated every 4
    assert as_given.scaled_to(rows) is as_given
    few = {"steps_for": 2 * rows, "schedule": {"warmup_steps": 4}}
    shortened = build_trainer(prepared, small_config(training=few)).scaled_to(rows).config.training
    assert (shortened.steps, shortened.validate_every, shortened.schedule.warmup_steps) == (6, 2, 2)
    fewest = (
        build_trainer(prepared, small_config(training={"steps_for": 1000 * rows}))
        .scaled_to(rows)
        .config.training
    )
    assert (fewest.steps, fewest.validate_every) == (
        6,
        2,
    )  # the four before the first validation, in three
    more = {"steps_for": rows // 2, "steps_per_dispatch": 2, "schedule": {"kind": "cosine"}}
    trainer = build_trainer(prepared, small_config(training=more))
    stretched = trainer.scaled_to(rows)
    assert (stretched.config.training.steps, stretched.config.training.validate_every) == (24, 8)
    assert trainer.optimizers.schedule(12) < 1e-6
    assert abs(float(stretched.optimizers.schedule(12)) - 0.5) < 1e-6
    dispatched = {"steps_for": rows // 2, "steps_per_dispatch": 4}
    trainer = build_trainer(prepared, small_config(training=dispatched))
    assert int(fit(trainer, prepared, tmp_path, validate=_by_norm).step) == 24
    with open_checkpoints(tmp_path, trainer.config, read_only=True) as checkpoints:
        assert checkpoints.latest() == 24  # by the configuration as it was given


@pytest.mark.parametrize("devices", [1, 8])
def test_a_batch_shrinks_to_the_data_in_parts_for_all_devices(prepared, devices, caplog):
    rows = prepared.num_examples
    trainer = build_trainer(prepared, small_config(training={"batch_size": 16 * rows}))
    assert trainer.sampling.batch_size == 16 * rows
    with caplog.at_level("WARNING"):
        scaled = trainer.scaled_to(rows, devices=devices)
    batch_size = rows // devices * devices
    assert scaled.config.training.batch_size == scaled.sampling.batch_size == batch_size
    assert f"batches have {batch_size} of the {rows} examples" in caplog.text
    fitting = build_trainer(prepared, small_config(training={"batch_size": batch_size}))
    assert fitting.scaled_to(rows, devices=devices) is fitting


def test_a_validation_that_finds_nothing_is_said_at_the_end(prepared, tmp_path, caplog):
    trainer = build_trainer(prepared, small_config())
    with caplog.at_level("WARNING"):
        fit(trainer, prepared, tmp_path, validate=lambda weights: {"recall@10": 0.0})
    assert "The best validation recall@10 is 0: no right answer was found" in caplog.text


def test_passes_in_the_place_of_steps(prepared, tmp_path):
    rows = prepared.num_examples
    batch = small_config().training.batch_size

    def scaled(**training):
        counted = {"steps": 1000, "validate_every": 200, "passes": 2.5} | training
        return build_trainer(prepared, small_config(training=counted)).scaled_to(rows)

    every = -(-rows // batch)
    steps = -(-5 * rows // (2 * batch))
    training = scaled().config.training
    assert (training.steps, training.validate_every) == (steps, every)
    assert training.scaled_to(rows) is training
    training = scaled(validate_every=7, steps_per_dispatch=4).config.training
    assert (training.steps, training.validate_every) == (-(-steps // 4) * 4, 8)
    assert scaled(passes=0.1).config.training.validate_every == -(-rows // (10 * batch))
    trainer = scaled(passes=1.0, schedule={"kind": "cosine"})
    assert abs(float(trainer.optimizers.schedule(every))) < 1e-6
    trainer = scaled(passes=1.0)
    assert int(fit(trainer, prepared, tmp_path, validate=None).step) == every
    # Whether a queue is ever used is known once the examples are counted.
    queue = {"queue": batch, "queue_warmup": 5 * every}
    late = small_config(training={"steps": 1000, "passes": 1}, objective={"negatives": queue})
    trainer = build_trainer(prepared, late)
    with pytest.raises(ConfigError, match=f"below config.training.steps={every}"):
        trainer.scaled_to(rows)


def test_streamed_or_resident_and_several_steps_a_dispatch_are_the_same_steps(prepared, tmp_path):
    states = []
    histories = []
    for resident_megabytes in (0, 100):
        for steps in (1, 4):
            training = {"resident_megabytes": resident_megabytes, "steps_per_dispatch": steps}
            trainer = build_trainer(prepared, small_config(training=training))
            workdir = tmp_path / str(len(states))
            states.append(fit(trainer, prepared, workdir, validate=_by_norm))
            lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
            histories.append([(line["step"], line.get("loss")) for line in lines])
    for other in states[1:]:
        _equal_bits(states[0], other)
    assert len(histories[0]) == 9
    assert all(history == histories[0] for history in histories)


def test_dispatches_chosen_by_time_are_the_same_steps_wherever_they_end(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "_steps_in_time", lambda seconds: 3)
    counts = []
    plain = loop.compile_steps

    def counted(*args):
        run = plain(*args)

        def run_counted(*args):
            launched = run(*args)
            counts.append(launched[-1])
            return launched

        return run_counted

    monkeypatch.setattr(loop, "compile_steps", counted)
    training = {"validate_every": 8, "log_every": 6}
    whole_config = small_config(training=training | {"steps_per_dispatch": 1})
    whole = fit(
        build_trainer(prepared, whole_config), prepared, tmp_path / "one", validate=_by_norm
    )
    assert counts == [1] * 12
    trainer = build_trainer(prepared, small_config(training=training))
    asked = [False, True]
    with monkeypatch.context() as patch, pytest.raises(PreemptedError, match="saved at step 3,"):
        patch.setattr(loop.Preemption, "is_due", lambda self, number: asked[number - 1])
        fit(trainer, prepared, tmp_path / "auto", validate=_by_norm)
    resumed = fit(trainer, prepared, tmp_path / "auto", validate=_by_norm)
    # One step to begin with, then twice as many as before, up to a line of metrics or a validation.
    assert counts[12:] == [1, 2] + [1, 2, 2, 3, 1]
    _equal_bits(whole, resumed)


def test_a_dispatch_takes_a_quarter_of_a_second_at_most():
    measured = [loop._steps_in_time(seconds) for seconds in (0.0, 0.0001, 0.01, 0.1, 3.0)]
    assert measured == [1, loop.MAX_STEPS, 25, 2, 1]


def test_a_run_of_one_step_a_dispatch_is_one_of_chosen_dispatches():
    one, auto, ten = (
        small_config(training={"steps_per_dispatch": n, "validate_every": 10, "steps": 20})
        for n in (1, 0, 10)
    )
    assert one.identity() == auto.identity() != ten.identity()


def test_a_run_ended_early_and_started_again_ends_in_the_same_bits(prepared, tmp_path):
    config = small_config(
        training={
            "schedule": {"kind": "cosine"},
            "tables": {"kind": "lazy_adam", "learning_rate": 0.01},
        }
    )
    whole = fit(build_trainer(prepared, config), prepared, tmp_path / "whole", validate=_by_norm)

    def dies(weights):
        dies.calls += 1
        if dies.calls == 4:
            raise KeyboardInterrupt
        return _by_norm(weights)

    dies.calls = 0
    with pytest.raises(KeyboardInterrupt):
        fit(build_trainer(prepared, config), prepared, tmp_path / "parts", validate=dies)
    resumed = fit(build_trainer(prepared, config), prepared, tmp_path / "parts", validate=_by_norm)
    _equal_bits(whole, resumed)
    steps = [
        json.loads(x)["step"]
        for x in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)


def test_a_finished_run_is_left_as_it_is(prepared, tmp_path):
    first = fit(build_trainer(prepared, small_config()), prepared, tmp_path, validate=None)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    _equal_bits(
        first, fit(build_trainer(prepared, small_config()), prepared, tmp_path, validate=None)
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_best_checkpoint_survives_retention_and_training_stops_early(prepared, tmp_path):
    config = small_config(
        training={"steps": 100, "validate_every": 2, "patience": 3, "keep_checkpoints": 1}
    )
    values = iter([0.0, 0.1, 0.5, 0.4, 0.5, 0.3])
    state = fit(
        build_trainer(prepared, config),
        prepared,
        tmp_path,
        validate=lambda w: {"recall@10": next(values)},
    )
    assert int(state.step) == 10
    with open_checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.best() == 4 and checkpoints.latest() == 10
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
        "10",
        "4",
    ]


def test_a_misspelt_metric_is_refused_before_the_first_step(prepared, tmp_path):
    config = small_config(training={"metric": "recal@10"})
    with pytest.raises(ConfigError, match="'recal@10' is not measured. Measured: recall@10"):
        fit(build_trainer(prepared, config), prepared, tmp_path, validate=_by_norm)


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(prepared, tmp_path):
    rates = {"validate_every": 1, "tables": {"learning_rate": 1e38}}
    config = small_config(model={"normalize": False}, training=rates)
    good = r"The last good checkpoint is .*checkpoints/[123]\."
    with pytest.raises(
        TrainingError, match=rf"(The loss is|the norm of the gradient) nan.* at step [234]\. {good}"
    ):
        fit(build_trainer(prepared, config), prepared, tmp_path, validate=None)


def test_the_transfer_guard_catches_a_hidden_transfer(prepared, tmp_path, monkeypatch):
    plain = loop.compile_steps

    def leaky(*args):
        step = plain(*args)
        return lambda state, i, most: (
            step(state, i, most)[0],
            {"loss": jax.numpy.add(1.0, np.ones(3)), "grad_norm": np.ones(1)},
            1,
        )

    monkeypatch.setattr(loop, "compile_steps", leaky)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit(build_trainer(prepared, small_config()), prepared, tmp_path, validate=None)


def test_patience_counts_validations_without_improvement():
    record = EarlyStopping(users=3, items=4)
    for step, value in enumerate([0.1, 0.3, 0.2, 0.3, 0.1]):
        record.update(step, value, patience=3)
    assert (record.best, record.best_step, record.waited, record.stopped) == (0.3, 1, 3, True)


def _rates_of_torch(values, *, patience, factor):
    """The factor on the rates after each validation, as the reference of PyTorch's
    `ReduceLROnPlateau(mode="max", threshold=0)` defines it: cut once the number of bad validations
    *exceeds* the patience, and begin to count anew."""
    best = -np.inf
    bad = 0
    scale = 1.0
    scales = []
    for value in values:
        if value > best:
            best = value
            bad = 0
        else:
            bad += 1
        if bad > patience:
            scale *= factor
            bad = 0
        scales.append(scale)
    return scales


@pytest.mark.parametrize("patience", [1, 3])
def test_the_plateau_cuts_the_rates_where_torch_does(patience):
    schedule = {"kind": "plateau", "patience": patience, "factor": 0.5}
    optimizers = Optimizers.build(small_config(training={"schedule": schedule}).training)
    # Nearly equal values tell a tolerance; float32 holds 0.7 as less than 0.7.
    random = np.random.default_rng(0).integers(0, 4, 30) / 10 + 0.7
    values = [-0.2, 0.0, 0.1, 0.1, 0.05, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7000001, *random]
    values = np.float32(values).tolist()
    opt_state = optimizers.init({"kernel": jax.numpy.zeros(2)})
    scales = []
    for value in values:
        opt_state = optimizers.after_validation(opt_state, value)
        scales.append(float(optimizers.rate_factor(jax.numpy.int32(0), opt_state)))
    assert scales == _rates_of_torch(values, patience=patience, factor=0.5)
    assert scales[-1] < 0.5


def test_a_plateau_that_would_not_lower_the_rates_is_refused():
    schedule = {"kind": "plateau", "factor": 1.0}
    config = small_config(training={"schedule": schedule})
    with pytest.raises(ConfigError, match="schedule.factor=1.0 must be above 0 and below 1"):
        resolve_kinds(config)


def test_the_best_step_is_the_earliest_of_equals():
    assert best_step({1: {"m": 0.2}, 5: {"m": 0.9}, 9: {"m": 0.9}, 12: {}}, "m") == 5
    assert best_step({1: {}, 2: {"other": 1.0}}, "m") is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(small_config(), workdir)
    return workdir


def test_a_run_is_loaded_from_its_folder_alone(finished):
    loaded = run.load_run(finished)
    assert loaded.step == 12 and loaded.config == small_config()
    again = run.load_run(finished, checkpoint="8")
    assert again.step == 8


@pytest.mark.usefixtures("all_devices")
def test_a_run_that_one_device_cannot_hold_is_loaded_onto_all(finished, monkeypatch):
    whole = run.load_run(finished)
    monkeypatch.setattr(
        checks, "_free_bytes", lambda mesh: 150_000
    )  # of 3 tables, 1,024 x 16 or x 4 or 512 x 8, and their state
    divided = run.load_run(finished)
    _equal_bits(whole.weights, divided.weights)
    tables = [(r.weights.tables["user.user_id"].sharding.num_devices) for r in (whole, divided)]
    assert tables == [1, 8]
    rows = {name: values[:20] for name, values in whole.prepared.features["user"].items()}
    vectors = [embed_rows(r.model, r.weights, "user", rows) for r in (whole, divided)]
    np.testing.assert_allclose(*vectors, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(checks, "_free_bytes", lambda mesh: 1000)
    with pytest.raises(ConfigError, match="on each of 8 devices"):
        run.load_run(finished)


def test_a_workdir_with_another_configuration_is_refused(finished):
    with pytest.raises(
        ConfigError, match="another configuration: config.training.batch_size was 64 and is now 32"
    ):
        train(small_config(training={"batch_size": 32}), finished)


def test_a_run_that_was_refused_before_its_first_checkpoint_can_be_corrected(tmp_path):
    size = 100_000
    queue = {"negatives": {"queue": size}}
    with pytest.raises(ConfigError, match="batch_size=100000 is larger than the data"):
        train(small_config(training={"batch_size": size}, objective=queue), tmp_path / "run")
    train(small_config(), tmp_path / "run")
    assert run.load_run(tmp_path / "run").step == 12


def test_the_best_checkpoint_is_loaded_unless_another_is_asked_for(tmp_path):
    values = iter([0.0, 0.1, 0.5, 0.4])
    train(
        small_config(),
        tmp_path / "run",
        make_validate=lambda *_: lambda weights: {"recall@10": next(values)},
    )
    assert [run.load_run(tmp_path / "run", checkpoint=c).step for c in ("best", "latest")] == [
        8,
        12,
    ]


def test_options_of_the_index_may_change_after_training(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    train(small_config(retrieval={"index": "exact"}), copy)
    assert run.load_run(copy).config.retrieval.index == "exact"


def test_reading_a_run_leaves_a_save_in_progress_alone(finished):
    unfinished = finished / "checkpoints" / "16.orbax-checkpoint-tmp"
    unfinished.mkdir()
    run.load_run(finished)
    assert unfinished.exists()
    unfinished.rmdir()


def test_vectors_that_cannot_be_ranked_stop_with_the_last_good_checkpoint(prepared, tmp_path):
    def validate(weights):
        validate.calls += 1
        if validate.calls == 3:
            raise ScoreError("Scores hold NaN.")
        return {"recall@10": 0.1}

    validate.calls = 0
    with pytest.raises(
        TrainingError,
        match=r"failed at step 8: Scores hold NaN. The last good checkpoint is .*checkpoints/4\.",
    ):
        fit(build_trainer(prepared, small_config()), prepared, tmp_path, validate=validate)


def test_frequencies_are_those_of_the_training_rows(prepared):
    counts = loop.count_rows(prepared)
    ids = prepared.raw.train["item_id"].to_pylist()
    expected = [ids.count(item) for item in prepared.items["item_id"].to_pylist()]
    np.testing.assert_array_equal(counts["item"], expected)
    assert counts["rows"] == len(ids) == counts["user"].sum()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="other files and no config.json"):
        train(small_config(), tmp_path)
    with pytest.raises(ConfigError, match="is no run"):
        run.load_run(tmp_path)


def test_a_configuration_that_was_changed_by_hand_is_refused(finished, tmp_path):
    # The data lies in the folder of the run; that of another configuration would have other rows.
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["shop_seed"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another run, of another configuration"):
        run.load_run(copy)


@pytest.mark.parametrize(
    "which,message",
    [("3", "no checkpoint of step 3; it has: "), ("newest", "must be best, latest or a step")],
)
def test_checkpoints_that_are_not_there(finished, which, message):
    with pytest.raises(CheckpointError, match=message):
        run.load_run(finished, checkpoint=which)


def test_a_corrupt_checkpoint_names_its_folder(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for path in (copy / "checkpoints" / "12" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00" * 10)
    with pytest.raises(CheckpointError, match=r"checkpoints/12 cannot be restored: it is damaged"):
        run.load_run(copy, checkpoint="latest")


def test_one_changed_byte_of_a_checkpoint_is_noticed(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    largest = max(
        (copy / "checkpoints" / "12" / "state").rglob("*"),
        key=lambda path: path.stat().st_size * path.is_file(),
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoints/12 cannot be restored"):
        run.load_run(copy, checkpoint="latest")


def test_a_checkpoint_of_another_run_of_the_same_shapes_is_refused(finished, tmp_path):
    train(small_config(training={"seed": 1}), tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    shutil.copytree(finished / "checkpoints", tmp_path / "other" / "checkpoints")
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run.load_run(tmp_path / "other")


def test_a_damaged_configuration_is_named(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is corrupt"):
        run.load_run(copy)
    with pytest.raises(ConfigError, match="config.json is corrupt"):
        train(small_config(), copy)


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["user"]["layers"] = config["model"]["item"]["layers"] = [8]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="written by a model with other"):
        run.load_run(copy)


def test_a_folder_elsewhere_is_refused_not_made_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match="--workdir=hdfs://host/run: addresses begin with gs:// or s3://"
    ):
        train(small_config(), "hdfs://host/run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resident_megabytes", [0, 100])
def test_tables_are_updated_in_place(prepared, resident_megabytes):
    config = small_config(training={"resident_megabytes": resident_megabytes})
    trainer = build_trainer(prepared, config)
    batches = make_batches(prepared, config)
    state = init_on(ONE, trainer, loop.count_rows(prepared))
    step = loop.compile_steps(trainer, batches, prepared, ONE)
    step(state, 0, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.tables, state.table_slots)))


def test_an_option_of_a_later_version_leaves_the_identity_of_a_run_as_it_is():
    old = {"seed": 3, "schedule": {"kind": "cosine"}}
    defaults = {"seed": 0, "schedule": {"kind": "constant"}}
    new = old | {"schedule": {"kind": "cosine", "floor": 0.0}, "ema": {}}
    later = {
        "seed": 0,
        "schedule": {"kind": "constant", "floor": 0.0},
        "ema": {},
    }
    assert (
        non_defaults(new, later)
        == non_defaults(old, defaults)
        == {"seed": 3, "schedule": {"kind": "cosine"}}
    )
    assert non_defaults(new | {"schedule": {"kind": "cosine", "floor": 0.1}}, later)[
        "schedule"
    ] == {
        "kind": "cosine",
        "floor": 0.1,
    }


def test_programs_for_a_gpu_give_the_same_bits_in_every_run(
    prepared, tmp_path, monkeypatch, own_programs
):
    """What they are compiled with. There is none here: that another option is refused shows that
    the compiler is told."""
    assert compiler_options(make_mesh(2)) == compiler_options(None) == {}
    # In a context: `undo` would bring back the programs of other tests, too.
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert (compiler_options(None), compiler_options(make_mesh(2))) == (
            {"xla_gpu_deterministic_ops": True},
            {},
        )
    assert (
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_deterministic_ops": True})(1.0) == 2.0
    )  # there is such an option
    config = small_config()
    trainer = build_trainer(prepared, config)
    weights = init_on(make_mesh(1), trainer, loop.count_rows(prepared)).weights
    for module in (loop, embed):
        monkeypatch.setattr(module, "compiler_options", lambda mesh: {"of_no_compiler": True})
    monkeypatch.setattr(embed, "_compiled_embed", embed._compiled_embed.__wrapped__)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of_no_compiler"):
        loop.fit(trainer, prepared, tmp_path, validate=None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of_no_compiler"):
        embed.embed_rows(trainer.model, weights, "item", prepared.features["item"])


def test_a_run_keeps_the_type_of_products_that_it_began_with(prepared, tmp_path, monkeypatch):
    config = small_config(model={"dtype": "auto"}, training={"steps": 4})
    monkeypatch.setattr(run, "fastest_dtype", lambda: "bfloat16")
    assert not run.holds_run(tmp_path, config)
    run.claim(tmp_path, config)
    # Another machine, and a configuration that names the type.
    monkeypatch.setattr(run, "fastest_dtype", lambda: "float32")
    assert run.load_config(tmp_path).model.dtype == "bfloat16"
    assert run.holds_run(tmp_path, config)
    assert run.with_known_dtype(config, tmp_path).model.dtype == "bfloat16"
    assert not run.holds_run(tmp_path, small_config(training={"steps": 4}))
    assert run.with_known_dtype(config, tmp_path / "new").model.dtype == "float32"


def test_a_run_goes_on_from_another_place_of_its_rows_but_not_in_another_order(tmp_path):
    run.claim(tmp_path, small_config(training={"input": "resident"}))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    # The order of "auto", "resident" and "host" is one.
    assert run.holds_run(tmp_path, small_config(training={"input": "host"}))
    with pytest.raises(ConfigError, match="input was 'auto' and is now 'stream'. A stream has ano"):
        run.holds_run(tmp_path, small_config(training={"input": "stream"}))


@pytest.mark.parametrize(
    "flags, dtype",
    [("fpu avx512f amx_bf16", "bfloat16"), ("avx512_bf16", "bfloat16"), ("avx512f", "float32")],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(dense, "_cpu_flags", lambda: set(flags.split()))
    assert dense.fastest_dtype() == dtype
    assert (arithmetic_type("auto") is None) == (dtype == "float32")
