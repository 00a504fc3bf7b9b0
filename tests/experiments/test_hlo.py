"""Reading compiled programs: what is counted is what was written."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import hlo, scaling
from twotower.core.mesh import REPLICATED, SHARDED, make_mesh

TRIPS = 5


def _program(step):
    mesh = make_mesh(4)
    x = jax.ShapeDtypeStruct((8, 16), "float32", sharding=jax.NamedSharding(mesh, SHARDED))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=SHARDED, out_specs=REPLICATED)
    return hlo.read(jax.jit(mapped).lower(x).compile().as_text())


def _looped(x):
    def body(total, _):
        total = jnp.tanh(total @ total.T @ total)
        return jax.lax.psum(total, "devices") + total, None

    start = jax.lax.pcast(jax.lax.psum(x, "devices"), "devices", to="varying")
    return jax.lax.psum(jax.lax.scan(body, start, length=TRIPS)[0], "devices")


def test_what_a_loop_does_counts_as_often_as_it_runs():
    program = _program(_looped)
    found = program.collectives()
    assert {collective.kind for collective in found} == {"all-reduce"}
    inside = [collective for collective in found if collective.in_loop]
    assert [collective.times for collective in inside] == [TRIPS] and len(found) == 3
    # Each device has 2 rows of 16 numbers: x x^T is 2 x 2, and its product with x 2 x 16 again.
    assert program.flops() == TRIPS * (2 * 2 * 2 * 16 + 2 * 2 * 16 * 2)
    assert hlo.Shape("f32", (2, 16)) in program.shapes()


def test_the_size_of_a_collective_is_that_of_the_whole():
    def step(x):
        whole = jax.lax.all_gather(x, "devices", tiled=True)
        part = jax.lax.psum_scatter(whole * 2, "devices", scatter_dimension=0, tiled=True)
        return jax.lax.psum(part.sum(), "devices")

    found = {collective.kind: collective for collective in _program(step).collectives()}
    whole = 8 * 16 * 4
    assert {kind: collective.nbytes for kind, collective in found.items()} == {
        "all-gather": whole,
        "reduce-scatter": whole,
        "all-reduce": 4,
    }
    assert found["all-gather"].sent(4) == found["reduce-scatter"].sent(4) == whole * 3 / 4
    assert found["all-reduce"].sent(4) == 2 * 4 * 3 / 4


@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_sends_and_computes_what_the_formulas_say(devices, capsys):
    setting = scaling.Setting(width=8, batch=1024, rows=1024, devices=devices)
    result = scaling.measured(setting)
    assert result["sent"] == setting.sent() and result["flops"] == setting.flops()
    assert f"{result['flops']:,}" in capsys.readouterr().out
    assert (result["sent"] > 0) == (devices > 1)
