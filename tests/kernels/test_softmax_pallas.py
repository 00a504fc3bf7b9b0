"""The GPU kernels of the softmax losses, by Pallas's interpreter: the naive loss's numbers, or the
blocks in their place."""

import functools
import logging
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
from twotower.kernels import softmax_pallas
from twotower.kernels.loss_inputs import Candidates, LossInputs
from twotower.kernels.softmax_reference import naive_softmax
from twotower.kernels.streaming_softmax import streaming_softmax

in_tiles = functools.partial(streaming_softmax, kernel="pallas", interpret=True)
in_bfloat16 = functools.partial(in_tiles, dtype=jnp.bfloat16)
SOFTMAX = options_of("softmax")
# Three tiles of rows and four of columns in two parts, the last of each filled up.
INPUTS = inputs_of(size=37, others=17)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    tiles = softmax_pallas.Tiles(rows=16, columns=16, warps=4, stages=1)
    monkeypatch.setattr(softmax_pallas, "TILES", {1024: tiles})
    monkeypatch.setattr(softmax_pallas, "_MIN_PROGRAMS", 5)


def _assert_close(got, expected, tolerance: float = 2e-5) -> None:
    """Each array within `tolerance` of its greatest number."""

    def compare(got, expected):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(size, 1e-3))

    jax.tree.map(compare, got, expected)


@pytest.mark.slow
def test_equals_the_naive_loss_with_everything_on():
    """Value and every gradient, the temperature's included, with hits, users met twice, padding,
    log expected counts, weights and hard negatives."""
    naive = value_and_gradients(naive_softmax, INPUTS, SOFTMAX)
    for array, gradient in naive[1].items():
        assert array == "bias" or jnp.abs(gradient).max() > 0
    _assert_close(value_and_gradients(in_tiles, INPUTS, SOFTMAX), naive)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["corrected_softmax", "bsl"])
def test_the_value_alone_equals_the_naive_one(name):
    """By one kernel with one product, which forms no gradient: of losses with other corrections, a
    temperature of the positive and a bias, and without masked users and hard negatives."""
    inputs = INPUTS
    options = options_of(name)
    if name == "bsl":
        options = options._replace(loss=options.loss._replace(biased=True), mask_same_user=False)
        inputs = inputs._replace(hard=None)
    compiled = [jax.jit(form, static_argnums=1) for form in (in_tiles, naive_softmax)]
    got, naive = (program(inputs, options) for program in compiled)
    np.testing.assert_allclose(got, naive, rtol=1e-5)
    program = str(jax.make_jaxpr(in_tiles, static_argnums=1)(inputs, options))
    assert program.count("pallas_call[") == 1
    assert program.count("dot_general[") == 1


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.01, 300.0])
def test_no_exponential_overflows_or_vanishes(scale):
    """Logits of thousands, and of nearly nothing."""
    inputs = INPUTS._replace(scale=jnp.float32(scale))
    naive = value_and_gradients(naive_softmax, inputs, SOFTMAX)
    _assert_close(value_and_gradients(in_tiles, inputs, SOFTMAX), naive)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_log_counts_that_are_all_greater_by_one_number_change_nothing(shift):
    """Logits are then far from 0, on one side of it."""

    def shifted(x):
        return x._replace(log_expected_count=x.log_expected_count + shift)

    inputs = INPUTS._replace(
        positives=shifted(INPUTS.positives),
        candidates=shifted(INPUTS.candidates),
        hard=shifted(INPUTS.hard),
    )
    naive = value_and_gradients(naive_softmax, INPUTS, SOFTMAX)
    # float32 counts in steps of 6e-5 there.
    _assert_close(value_and_gradients(in_tiles, inputs, SOFTMAX), naive, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["items", "users"])
def test_a_query_whose_candidates_are_all_masked(masks):
    """All are query 3's positive, or positives of its user; hard negatives it has none either."""
    all_masked = jnp.full(len(INPUTS.candidates.ids), 1000, jnp.int32)
    inputs = INPUTS._replace(hard=INPUTS.hard._replace(ids=INPUTS.hard.ids.at[3].set(-1)))
    if masks == "items":
        positives = INPUTS.positives._replace(ids=INPUTS.positives.ids.at[3].set(1000))
        candidates = INPUTS.candidates._replace(ids=all_masked)
        inputs = inputs._replace(positives=positives, candidates=candidates)
    else:
        candidates = INPUTS.candidates._replace(query_ids=all_masked)
        query_ids = INPUTS.query_ids.at[3].set(1000)
        inputs = inputs._replace(query_ids=query_ids, candidates=candidates)
    got = value_and_gradients(in_tiles, inputs, SOFTMAX)
    _assert_close(got, value_and_gradients(naive_softmax, inputs, SOFTMAX))
    is_moved = (got[1]["queries"] != 0).any(axis=1)
    assert [bool(x) for x in is_moved[2:6]] == [False, False, True, True]


@pytest.mark.slow
def test_without_negatives_nothing_is_lost_or_moved():
    none = INPUTS.candidates._replace(ids=jnp.full(len(INPUTS.candidates.ids), -1, jnp.int32))
    hard = INPUTS.hard._replace(ids=jnp.full(INPUTS.hard.ids.shape, -1, jnp.int32))
    loss, gradients = value_and_gradients(
        in_tiles, INPUTS._replace(candidates=none, hard=hard), SOFTMAX
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.slow
def test_what_is_not_a_number_is_seen():
    vectors = INPUTS.candidates.vectors.at[4, 0].set(jnp.nan)
    inputs = INPUTS._replace(candidates=INPUTS.candidates._replace(vectors=vectors))
    assert np.isnan(value_and_gradients(in_tiles, inputs, SOFTMAX)[0])


@pytest.mark.slow
def test_bfloat16_operands_are_right_to_their_eight_bits():
    naive = value_and_gradients(naive_softmax, INPUTS, SOFTMAX)[1]
    got = value_and_gradients(in_bfloat16, INPUTS, SOFTMAX)[1]
    for array in ("queries", "items", "scale"):
        error = float(jnp.linalg.norm(got[array] - naive[array]))
        assert got[array].dtype == jnp.float32
        assert 0 < error < 1e-2 * float(jnp.linalg.norm(naive[array]))


def _sharded(inputs: LossInputs, form, *, check_vma: bool):
    """The loss as a function of arrays, the queries cut into two and the items gathered."""

    def loss(arrays, inputs):
        gather = functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True)
        inputs = with_arrays(inputs, arrays)
        inputs = inputs._replace(candidates=Candidates(*map(gather, inputs.candidates)))
        return jax.lax.psum(form(inputs, SOFTMAX), "devices")

    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    cut = PartitionSpec("devices")
    whole = PartitionSpec()
    specs = {name: whole if name in ("scale", "bias") else cut for name in arrays_of(inputs)}
    input_specs = jax.tree.map(lambda _: cut, inputs)._replace(scale=whole, bias=whole)
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(specs, input_specs), out_specs=whole, check_vma=check_vma
    )
    return jax.jit(jax.value_and_grad(lambda arrays: sharded(arrays, inputs)))


@pytest.mark.slow
def test_two_devices_equal_one():
    inputs = inputs_of(size=36, others=0)
    # The interpreter knows no axes that values vary over.
    two = _sharded(inputs, in_tiles, check_vma=False)
    _assert_close(two(arrays_of(inputs)), value_and_gradients(naive_softmax, inputs, SOFTMAX))


@pytest.mark.slow
def test_the_kernels_are_lowered_for_a_gpu_in_a_shard_map(monkeypatch):
    """Without a GPU, to Triton's language: two kernels, and no matrix of [queries, candidates]."""
    monkeypatch.setattr(softmax_pallas, "is_usable", lambda *args, **names: True)
    inputs = inputs_of(size=200, others=0)
    form = functools.partial(streaming_softmax, kernel="pallas", dtype=jnp.bfloat16)
    traced = _sharded(inputs, form, check_vma=True).trace(arrays_of(inputs))
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this JAX lowers for a GPU only where there is one: {error}")
    assert text.count("@__gpu$xla.gpu.triton(") == 2
    assert not {"100x200", "112x208", "112x224"} & set(re.findall(r"\d+x\d+", text))


def _messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "softmax_kernel" in record.message]


def test_the_blocks_serve_what_the_kernels_do_not_and_it_is_said_once(caplog, monkeypatch):
    """A loss of another kind, a backend that is no GPU, wide vectors, and kernels that do not
    compile, as they do not on a CPU."""
    caplog.set_level(logging.WARNING)
    softmax_pallas._log_once.cache_clear()
    softmax_pallas._compile_error.cache_clear()
    inputs = inputs_of()
    wide = inputs_of(width=300)

    def is_refused(inputs: LossInputs, name: str, words: str) -> None:
        with_kernel = functools.partial(streaming_softmax, kernel="pallas")
        programs = []
        for form in (streaming_softmax, with_kernel, with_kernel):
            # A new function each time, so that it is traced again.
            program = jax.make_jaxpr(lambda x, form=form: form(x, options_of(name)))(inputs)
            programs.append(str(program))
        assert programs[0] == programs[1] == programs[2]
        assert [words in message for message in _messages(caplog)] == [True]
        caplog.clear()

    is_refused(inputs, "gbce", "no function of the negatives' summed exponentials")
    is_refused(inputs, "softmax", "the backend is cpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    is_refused(wide, "softmax", "300 are wider than 256")
    is_refused(inputs, "softmax", "fail here (ValueError: Only interpret mode")
