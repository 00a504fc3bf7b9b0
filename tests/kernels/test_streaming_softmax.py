"""The streaming loss: the naive one's numbers, without its matrix, on one device and on eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.objectives.cases import (
    arrays_of,
    inputs_of,
    options_of,
    value_and_gradients,
    with_arrays,
)
from twotower.kernels import softmax_blocks
from twotower.kernels.loss_inputs import Candidates, LossInputs, LossOptions
from twotower.kernels.softmax_reference import naive_softmax
from twotower.kernels.streaming_softmax import streaming_softmax
from twotower.objectives.losses import LOSSES

pytestmark = pytest.mark.slow

# 13 queries in blocks of 4, so that the last is filled up.
in_blocks = functools.partial(streaming_softmax, block=4)
one_by_one = functools.partial(streaming_softmax, block=1)
in_bfloat16 = functools.partial(streaming_softmax, dtype=jnp.bfloat16)
# Options are made once for each loss, so that they are equal in every test and programs are shared.
OPTIONS = {name: options_of(name) for name in LOSSES}


def _assert_close(got, expected, tolerance: float = 1e-10) -> None:
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_naive_loss_with_everything_on(name):
    """Loss and every gradient, in float64; and the value where no gradient is asked for."""
    with jax.enable_x64(True):
        inputs = inputs_of(jnp.float64)
        naive = value_and_gradients(naive_softmax, inputs, OPTIONS[name])
        assert naive[0] > 0.1
        for array, gradient in naive[1].items():
            assert array in ("scale", "bias") or jnp.abs(gradient).max() > 0
        assert (naive[1]["scale"] != 0) == LOSSES[name].scaled
        assert (naive[1]["bias"] != 0) == LOSSES[name].biased
        _assert_close(value_and_gradients(in_blocks, inputs, OPTIONS[name]), naive)
        value = jax.jit(in_blocks, static_argnums=1)(inputs, OPTIONS[name])
        _assert_close(value, naive[0])


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "change", ["users not masked", "no hard negatives", "no bias", "blocks of 1", "blocks chosen"]
)
def test_equals_the_naive_loss_with_a_part_left_out(name, change):
    with jax.enable_x64(True):
        inputs = inputs_of(jnp.float64)
        options = OPTIONS[name]
        form = in_blocks
        match change:
            case "users not masked":
                options = options._replace(mask_same_user=False)
            case "no hard negatives":
                inputs = inputs._replace(hard=None)
            case "no bias":
                inputs = inputs._replace(bias=None)
            case "blocks of 1":
                form = one_by_one
            case "blocks chosen":
                form = streaming_softmax
        naive = value_and_gradients(naive_softmax, inputs, options)
        _assert_close(value_and_gradients(form, inputs, options), naive)


@pytest.mark.parametrize("length", [1.0, 5.0, 15.0])
@pytest.mark.parametrize("name", ["softmax", "corrected_softmax", "bsl"])
def test_no_exponential_vanishes_however_far_logits_are_below_what_lengths_allow(name, length):
    """Every item points away from some queries: their greatest logits are down to -225, where 225
    was possible."""
    inputs = inputs_of()
    away = jnp.eye(1, 5) * length + jnp.arange(5)[None, :] / 100
    items = jnp.abs(inputs.candidates.vectors) * 0.01 - away
    inputs = inputs._replace(
        queries=inputs.queries.at[3:9].set(away),
        positives=inputs.positives._replace(vectors=items[jnp.arange(13)]),
        candidates=inputs.candidates._replace(vectors=items),
        scale=jnp.float32(1.0),
        hard=None,
    )
    naive = value_and_gradients(naive_softmax, inputs, OPTIONS[name])
    assert all(jnp.isfinite(gradient).all() for gradient in jax.tree.leaves(naive))
    _assert_close(value_and_gradients(in_blocks, inputs, OPTIONS[name]), naive, 2e-4)


def test_the_value_alone_forms_no_gradient():
    inputs = inputs_of()

    def value(arrays):
        return in_blocks(with_arrays(inputs, arrays), OPTIONS["softmax"])

    programs = [str(jax.make_jaxpr(f)(arrays_of(inputs))) for f in (value, jax.grad(value))]
    assert [text.count("dot_general") for text in programs] == [1, 3]


def test_rows_of_several_queries_are_queries_of_one_user():
    """[B, L, D]: the user of a row is that of its L queries."""
    inputs = inputs_of(size=12)
    users = jnp.array([3, -1, 5], jnp.int32)

    def cut(x):
        return x.reshape(3, 4, *x.shape[1:])

    rows = inputs._replace(
        queries=cut(inputs.queries),
        query_ids=users,
        weights=cut(inputs.weights),
        positives=jax.tree.map(cut, inputs.positives),
        hard=jax.tree.map(cut, inputs.hard),
    )
    alone = inputs._replace(query_ids=jnp.repeat(users, 4))
    got = jax.jit(in_blocks, static_argnums=1)(rows, OPTIONS["softmax"])
    np.testing.assert_allclose(got, naive_softmax(alone, OPTIONS["softmax"]), rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "bpr"])
def test_missing_hard_negatives_are_none(name):
    inputs = inputs_of()
    missing = inputs.hard._replace(
        ids=jnp.full((13, 3), -1, jnp.int32), vectors=jnp.full((13, 3, 5), 1e9)
    )
    got = value_and_gradients(streaming_softmax, inputs._replace(hard=missing), OPTIONS[name])
    expected = value_and_gradients(streaming_softmax, inputs._replace(hard=None), OPTIONS[name])
    for array in ("queries", "items"):
        np.testing.assert_allclose(got[1][array], expected[1][array], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "triplet"])
def test_the_order_of_queries_and_of_candidates_does_not_matter(name):
    inputs = inputs_of()
    rng = np.random.default_rng(0)
    rows = rng.permutation(13)
    columns = rng.permutation(22)
    moved = LossInputs(
        inputs.queries[rows],
        inputs.query_ids[rows],
        inputs.weights[rows],
        jax.tree.map(lambda x: x[rows], inputs.positives),
        jax.tree.map(lambda x: x[columns], inputs.candidates),
        inputs.scale,
        inputs.bias,
        jax.tree.map(lambda x: x[rows], inputs.hard),
    )
    loss, gradients = value_and_gradients(streaming_softmax, inputs, OPTIONS[name])
    got, moved_gradients = value_and_gradients(streaming_softmax, moved, OPTIONS[name])
    np.testing.assert_allclose(got, loss, rtol=1e-6)
    for array, order in (("queries", rows), ("items", columns)):
        np.testing.assert_allclose(
            moved_gradients[array], gradients[array][order], rtol=1e-4, atol=1e-5
        )


def test_padding_candidates_equal_none():
    inputs = inputs_of()
    candidates = inputs.candidates
    kept = np.flatnonzero(candidates.ids >= 0)
    assert kept.size < len(candidates.ids)
    sliced = inputs._replace(candidates=jax.tree.map(lambda x: x[kept], candidates))
    filled = candidates._replace(vectors=candidates.vectors.at[-1].set(1e9))
    loss = jax.jit(streaming_softmax, static_argnums=1)
    got = loss(inputs._replace(candidates=filled), OPTIONS["softmax"])
    np.testing.assert_allclose(got, loss(sliced, OPTIONS["softmax"]), rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "corrected_softmax", "sigmoid"])
def test_without_negatives_nothing_is_lost_or_moved(name):
    inputs = inputs_of()
    none = inputs.candidates._replace(ids=jnp.full(22, -1, jnp.int32))
    inputs = inputs._replace(candidates=none, hard=None)
    loss, gradients = value_and_gradients(streaming_softmax, inputs, OPTIONS[name])
    assert loss == 0
    assert not any(gradients[array].any() for array in ("queries", "items"))


def test_what_is_not_a_number_is_seen():
    inputs = inputs_of()
    inputs = inputs._replace(queries=inputs.queries.at[4, 0].set(jnp.nan))
    assert np.isnan(jax.jit(streaming_softmax, static_argnums=1)(inputs, OPTIONS["softmax"]))


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_operands(name):
    """Scores of 1e4 and more stay finite, and the gradients of ordinary ones are right to
    bfloat16's 8 bits."""

    def gradient(scale, form):
        inputs = inputs_of()._replace(scale=jnp.float32(scale))
        return value_and_gradients(form, inputs, OPTIONS[name])[1]["items"]

    assert np.isfinite(gradient(1e4, in_bfloat16)).all()
    exact = gradient(0.5, streaming_softmax)
    got = gradient(0.5, in_bfloat16)
    assert exact.dtype == got.dtype == jnp.float32
    assert float(jnp.abs(got - exact).max()) < 0.02 * float(jnp.abs(exact).max())


def test_bfloat16_exponentials_are_rounded_to_nearest_and_hide_nothing():
    samples = jnp.asarray(np.random.default_rng(0).uniform(-90, 90, 10_000), jnp.float32)
    special = jnp.float32([0, 1, 3e-39, np.inf, np.nan, -np.nan])
    values = jnp.concatenate([jnp.exp(samples), special])[None]
    narrow = jax.jit(functools.partial(softmax_blocks._narrow, dtype=jnp.bfloat16))(values)
    expected = values.astype(jnp.bfloat16)
    ties = (values.view(np.uint32) & 0xFFFF) == 0x8000
    np.testing.assert_array_equal(
        narrow[~ties].astype(np.float32), expected[~ties].astype(np.float32)
    )


def test_bfloat16_operands_are_summed_in_float32():
    """Vectors of 8 bits and slopes of 1, as those of triplets are, lose nothing: the sums are all
    that could."""
    inputs = inputs_of()
    rounded = inputs.candidates.vectors.astype(jnp.bfloat16).astype(float)
    inputs = inputs._replace(
        queries=inputs.queries.astype(jnp.bfloat16).astype(float),
        candidates=inputs.candidates._replace(vectors=rounded),
        weights=jnp.ones(13),
        hard=None,
    )
    loss, gradients = value_and_gradients(in_bfloat16, inputs, OPTIONS["triplet"])
    expected, exact = value_and_gradients(streaming_softmax, inputs, OPTIONS["triplet"])
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    for array in ("queries", "items"):
        np.testing.assert_allclose(gradients[array], exact[array], rtol=1e-6, atol=1e-6)


def _gathered_loss(arrays, inputs: LossInputs, options: LossOptions):
    """The loss of one of eight devices that share their items, summed over them."""
    gather = functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True)
    inputs = with_arrays(inputs, arrays)
    candidates = Candidates(*map(gather, inputs.candidates))
    loss = streaming_softmax(inputs._replace(candidates=candidates), options, block=8)
    return jax.lax.psum(loss, "devices")


def _on_eight(inputs: LossInputs, options: LossOptions):
    """The loss as a function of arrays, the batch cut into eight, and these arrays."""
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    cut = PartitionSpec("devices")
    whole = PartitionSpec()
    arrays = arrays_of(inputs)
    specs = {name: whole if name in ("scale", "bias") else cut for name in arrays}
    input_specs = jax.tree.map(lambda _: cut, inputs)._replace(scale=whole, bias=whole)
    sharded = jax.shard_map(
        functools.partial(_gathered_loss, options=options),
        mesh=mesh,
        in_specs=(specs, input_specs),
        out_specs=whole,
        check_vma=True,
    )
    return (lambda arrays: sharded(arrays, inputs)), arrays


@pytest.mark.parametrize("name", ["softmax", "corrected_softmax", "sigmoid"])
def test_eight_devices_equal_one(name):
    """Queries local, items gathered: loss and every gradient, in float64, with everything on but
    padding."""
    with jax.enable_x64(True):
        inputs = inputs_of(jnp.float64, size=24, others=0)
        eight, arrays = _on_eight(inputs, OPTIONS[name])
        got = jax.jit(jax.value_and_grad(eight))(arrays)
        _assert_close(got, value_and_gradients(naive_softmax, inputs, OPTIONS[name]))


def _computation(text: str, name: str) -> str:
    """The body of an HLO computation, with those of the computations that it calls."""
    found = re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S).group(0)
    called = set(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", found))
    return found + "".join(_computation(text, other) for other in called)


def test_no_collective_in_the_loop_and_no_matrix_of_scores():
    """Read off the compiled value and gradient on eight devices: 64 queries each, 512 candidates,
    blocks of 8."""
    eight, arrays = _on_eight(inputs_of(size=512, others=0, width=4), OPTIONS["softmax"])
    text = jax.jit(jax.value_and_grad(eight)).lower(arrays).compile().as_text()
    collective = re.compile(r"all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all")
    bodies = re.findall(r"body=%?([\w.\-]+)", text)
    assert bodies and collective.search(text)
    assert not any(collective.search(_computation(text, body)) for body in bodies)
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    largest = max(np.prod([int(n) for n in dims.split(",")]) for dims in shapes)
    assert largest < 64 * 512
