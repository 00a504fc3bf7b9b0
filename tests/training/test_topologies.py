"""A run saved on some devices goes on on others: the same steps, to the bit where the devices are
the same."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import hlo
from tests.training.divided import differences, mesh_of
from tests.training.shop import TINY_FEATURES, build_trainer, small_config
from twotower.core.mesh import make_mesh
from twotower.pipeline.prepare import prepare
from twotower.training.candidates import count_rows
from twotower.training.checkpoint import checksum, device_checksum
from twotower.training.init import abstract_state, init_on
from twotower.training.loop import fit

pytestmark = pytest.mark.slow

CONFIG = small_config(
    features=TINY_FEATURES,
    model={"user": {"layers": (8,), "dropout": 0.1}, "item": {"layers": (8,)}},
    objective={"negatives": {"queue": 144, "frequency": "gap"}},
    training={
        "batch_size": 48,
        "steps": 8,
        "validate_every": 2,
        "log_every": 1,
        "steps_per_dispatch": 2,
        "tables": {"kind": "lazy_adam", "learning_rate": 0.01},
        "schedule": {"kind": "plateau", "patience": 1},
        "optimizer": {"kind": "adagrad"},
    },
)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def tiny():
    """The data of `CONFIG`."""
    return prepare(CONFIG)


@pytest.fixture
def go_on(tiny):
    """(folder, devices, last step or None) -> the state, where the run was not stopped."""
    trainer = build_trainer(tiny, CONFIG)

    def run(workdir, devices, until=None):
        calls = iter(range(10**6))

        def validate(weights):
            # The last checkpoint is that of the validation before.
            if until is not None and next(calls) == until:
                raise Stopped
            return {"recall@10": 0.5}

        return fit(trainer, tiny, workdir, validate=validate, mesh=mesh_of(devices))

    return run


def test_saved_on_eight_devices_it_goes_on_on_three_and_on_eight_again(go_on, tmp_path):
    whole = go_on(tmp_path / "whole", 8)
    with pytest.raises(Stopped):
        go_on(tmp_path / "moved", 8, until=2)  # one is asked for before the first step
    shutil.copytree(tmp_path / "moved", tmp_path / "stayed")
    same = go_on(tmp_path / "stayed", 8)
    assert not differences(jax.device_get(same), jax.device_get(whole))
    # Tables of three devices have rows of padding that those of eight lack.
    with pytest.raises(Stopped):
        go_on(tmp_path / "moved", 3, until=1)
    moved = go_on(tmp_path / "moved", 8)
    assert int(moved.step) == int(whole.step) == 8
    assert float(moved.opt_state["plateau"].scale) < 1
    assert all(
        len(x.sharding.device_set) == 8 for x in jax.tree.leaves((moved.tables, moved.table_slots))
    )
    far = differences(jax.device_get(moved), jax.device_get(whole))
    assert max(far.values()) < 1e-5, max(far, key=far.get)


def test_the_checksum_of_a_state_is_the_same_on_any_mesh_and_brings_no_table_together(tiny):
    trainer = build_trainer(tiny, CONFIG)
    counts = count_rows(tiny)
    sums = {n: int(checksum(init_on(make_mesh(n), trainer, counts))) for n in (1, 8)}
    assert sums[1] == sums[8]
    program = hlo.read(
        device_checksum.lower(abstract_state(trainer, make_mesh(8))).compile().as_text()
    )
    found = program.collectives()
    assert found and {collective.kind for collective in found} == {"all-reduce"}
    assert all(shape.size == 1 for collective in found for shape in collective.shapes)


def test_the_checksum_sees_one_element_of_one_device(prepared):
    mesh = make_mesh(8)
    table = jax.device_put(
        jnp.arange(1024 * 4.0).reshape(1024, 4), jax.NamedSharding(mesh, jax.P("devices"))
    )
    before = int(checksum({"t": table}))
    entries = [(0, 0), (500, 1), (1023, 3)]
    assert before not in {int(checksum({"t": table.at[entry].add(1.0)})) for entry in entries}
    assert before == int(checksum({"t": np.asarray(table)}))


def test_the_host_sums_by_blocks_as_a_device_does_at_once():
    # Floats and whole numbers, and more of them than a block.
    table = np.linspace(-1.0, 1.0, 2**19 + 3, dtype=np.float32)
    state = jax.device_put({"table": table, "step": np.int32(7)})
    assert checksum(state) == int(device_checksum(state))
