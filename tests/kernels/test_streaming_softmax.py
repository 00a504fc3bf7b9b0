"""The streaming loss: the naive one's numbers, without its matrix, on one device and on eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.objectives.cases import Case, case
from twotower.kernels import softmax_blocks as sweep
from twotower.kernels.reference import naive_loss
from twotower.kernels.streaming_softmax import streaming_loss
from twotower.objectives import LOSSES
from twotower.objectives.negatives import Candidates, HardNegatives, Positives


def _differentiable(c: Case) -> dict:
    o = c.options
    return {
        "queries": c.queries,
        "positives": c.positives.vectors,
        "items": c.items,
        "hard": o["hard"].vectors,
        "scale": o["scale"],
        "bias": o["bias"],
        "weights": o["weights"],
    }


def _of(form, c: Case, arrays: dict, **changes) -> jax.Array:
    options = c.options | {n: arrays[n] for n in ("scale", "bias", "weights")} | changes
    if options["hard"] is not None:
        options["hard"] = options["hard"]._replace(vectors=arrays["hard"])
    positives = c.positives._replace(vectors=arrays["positives"])
    return form(arrays["queries"], positives, arrays["items"], c.candidates, **options)


def _both(c: Case, **changes) -> list:
    """(loss, gradients) of the naive and of the streaming form."""
    block = changes.pop("block", 4)
    forms = (naive_loss, functools.partial(streaming_loss, block=block))
    return [
        jax.jit(jax.value_and_grad(lambda a, f=form: _of(f, c, a, **changes)))(_differentiable(c))
        for form in forms
    ]


def _assert_close(got, expected, tolerance: float = 1e-10) -> None:
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, expected
    )


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_naive_loss_with_everything_on(name):
    """Loss and every gradient, in float64; 13 queries in blocks of 4, so that the last is filled
    up."""
    with jax.enable_x64(True):
        naive, streaming = _both(case(name, jnp.float64))
        assert naive[0] > 0.1 and all(
            jnp.abs(g).max() > 0 for n, g in naive[1].items() if n not in ("scale", "bias")
        )
        assert (naive[1]["scale"] != 0) == LOSSES[name].scaled and (
            naive[1]["bias"] != 0
        ) == LOSSES[name].biased
        _assert_close(streaming, naive)


@pytest.mark.parametrize(
    "changes",
    [{"mask_same_user": False}, {"hard": None}, {"bias": None}, {"block": 1}, {"block": 0}],
    ids=str,
)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_equals_the_naive_loss_with_a_part_left_out(name, changes):
    with jax.enable_x64(True):
        naive, streaming = _both(case(name, jnp.float64), **changes)
        _assert_close(streaming, naive)


@pytest.mark.parametrize("length", [1.0, 5.0, 15.0])
@pytest.mark.parametrize("name", ["softmax", "corrected_softmax", "bsl"])
def test_no_exponential_vanishes_however_far_logits_are_below_what_lengths_allow(name, length):
    """Every item points away from some queries: their greatest logits are down to -225, where 225
    was possible."""
    c = case(name)
    away = jnp.eye(1, 5) * length + jnp.arange(5)[None, :] / 100
    queries, items = c.queries.at[3:9].set(away), jnp.abs(c.items) * 0.01 - away
    c = c._replace(
        queries=queries, items=items, positives=c.positives._replace(vectors=items[jnp.arange(13)])
    )
    arrays = _differentiable(c) | {"scale": jnp.float32(1.0)}
    naive, streaming = (
        jax.value_and_grad(lambda a, f=f: _of(f, c, a, hard=None))(arrays)
        for f in (naive_loss, functools.partial(streaming_loss, block=4))
    )
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(naive))
    _assert_close(streaming, naive, 2e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_alone_is_the_same_value(name):
    with jax.enable_x64(True):
        c = case(name, jnp.float64)
        value = jax.jit(lambda a: _of(functools.partial(streaming_loss, block=4), c, a))(
            _differentiable(c)
        )
        _assert_close(value, _of(naive_loss, c, _differentiable(c)))


def test_the_value_alone_forms_no_gradient():
    c = case("softmax")
    value = lambda a: _of(functools.partial(streaming_loss, block=4), c, a)  # noqa: E731
    counts = [
        str(jax.make_jaxpr(f)(_differentiable(c))).count("dot_general")
        for f in (value, jax.grad(value))
    ]
    assert counts == [1, 3]


def test_rows_of_several_queries_are_queries_of_one_user():
    """[B, L, D]: the owner of a row is that of its L queries."""
    c = case("softmax", size=12)
    cut = lambda x: x.reshape(3, 4, *x.shape[1:])  # noqa: E731
    owners = jnp.array([3, -1, 5], jnp.int32)
    options = c.options | {"owners": owners}
    rows = options | {
        "weights": cut(options["weights"]),
        "hard": HardNegatives(*map(cut, options["hard"])),
    }
    got = streaming_loss(
        cut(c.queries), Positives(*map(cut, c.positives)), c.items, c.candidates, **rows, block=5
    )
    options["owners"] = jnp.repeat(owners, 4)
    np.testing.assert_allclose(
        got, naive_loss(c.queries, c.positives, c.items, c.candidates, **options), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["softmax", "bpr"])
def test_missing_hard_negatives_are_none(name):
    c = case(name)
    missing = c.options["hard"]._replace(
        ids=jnp.full((13, 3), -1, jnp.int32), vectors=jnp.full((13, 3, 5), 1e9)
    )
    with_missing = jax.grad(
        lambda q: streaming_loss(q, *c[1:4], **(c.options | {"hard": missing}))
    )(c.queries)
    without = jax.grad(lambda q: streaming_loss(q, *c[1:4], **(c.options | {"hard": None})))(
        c.queries
    )
    np.testing.assert_allclose(with_missing, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "triplet"])
def test_the_order_of_queries_and_of_candidates_does_not_matter(name):
    c, rng = case(name), np.random.default_rng(0)
    of = lambda c: jax.value_and_grad(
        lambda q, v: streaming_loss(q, c.positives, v, *c[3:4], **c.options), (0, 1)
    )(*c[::2][:2])  # noqa: E731
    rows, columns = rng.permutation(13), rng.permutation(22)
    moved = {n: x[rows] for n, x in c.options.items() if n in ("weights", "owners")}
    moved["hard"] = HardNegatives(*(x[rows] for x in c.options["hard"]))
    other = Case(
        c.queries[rows],
        Positives(*(x[rows] for x in c.positives)),
        c.items[columns],
        Candidates(*(x[columns] for x in c.candidates)),
        c.options | moved,
    )
    (loss, (queries, items)), (got, (by_queries, by_items)) = of(c), of(other)
    np.testing.assert_allclose(got, loss, rtol=1e-6)
    np.testing.assert_allclose(by_queries, queries[rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_items, items[columns], rtol=1e-4, atol=1e-5)


def test_padding_candidates_equal_none():
    c = case("softmax")
    kept = np.flatnonzero(c.candidates.ids >= 0)
    assert kept.size < len(c.candidates.ids)
    sliced = streaming_loss(
        c.queries,
        c.positives,
        c.items[kept],
        Candidates(*(x[kept] for x in c.candidates)),
        **c.options,
    )
    filled = c.items.at[-1].set(1e9)
    np.testing.assert_allclose(
        streaming_loss(c.queries, c.positives, filled, c.candidates, **c.options), sliced, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["softmax", "corrected_softmax", "sigmoid"])
def test_without_negatives_nothing_is_lost_or_moved(name):
    c = case(name)
    candidates = c.candidates._replace(ids=jnp.full(22, -1, jnp.int32))
    value = jax.value_and_grad(
        lambda q, v: streaming_loss(q, c.positives, v, candidates, **(c.options | {"hard": None})),
        (0, 1),
    )
    loss, gradients = value(c.queries, c.items)
    assert loss == 0 and not any(g.any() for g in gradients)


def test_what_is_not_a_number_is_seen():
    c = case("softmax")
    assert np.isnan(streaming_loss(c.queries.at[4, 0].set(jnp.nan), *c[1:4], **c.options))


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_operands(name):
    """Scores of 1e4 and more stay finite, and the gradients of ordinary ones are right to
    bfloat16's 8 bits."""
    c = case(name)
    gradient = lambda scale, dtype: jax.grad(  # noqa: E731
        lambda v: streaming_loss(
            c.queries, c.positives, v, c.candidates, **(c.options | {"scale": scale}), dtype=dtype
        )
    )(c.items)
    assert np.isfinite(gradient(1e4, jnp.bfloat16)).all()
    exact, got = gradient(0.5, None), gradient(0.5, jnp.bfloat16)
    assert exact.dtype == got.dtype == jnp.float32
    assert float(jnp.abs(got - exact).max()) < 0.02 * float(jnp.abs(exact).max())


def test_bfloat16_exponentials_are_rounded_to_nearest_and_hide_nothing():
    drawn = jnp.asarray(np.random.default_rng(0).uniform(-90, 90, 10_000), jnp.float32)
    values = jnp.concatenate([jnp.exp(drawn), jnp.float32([0, 1, 3e-39, np.inf, np.nan, -np.nan])])[
        None
    ]
    narrow = jax.jit(functools.partial(sweep._narrow, dtype=jnp.bfloat16))(values)
    expected = values.astype(jnp.bfloat16)
    ties = (values.view(np.uint32) & 0xFFFF) == 0x8000
    np.testing.assert_array_equal(
        narrow[~ties].astype(np.float32), expected[~ties].astype(np.float32)
    )


def test_bfloat16_operands_are_summed_in_float32():
    """Vectors of 8 bits and slopes of 1, as those of triplets are, lose nothing: the sums are all
    that could."""
    c = case("triplet")
    c = c._replace(
        queries=c.queries.astype(jnp.bfloat16).astype(float),
        items=c.items.astype(jnp.bfloat16).astype(float),
    )
    options = c.options | {"weights": jnp.ones(13), "hard": None}
    value = jax.value_and_grad(
        lambda q, v, dtype: streaming_loss(q, c.positives, v, c.candidates, **options, dtype=dtype),
        (0, 1),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        value(c.queries, c.items, jnp.bfloat16),
        value(c.queries, c.items, None),
    )


def _gathered_loss(arrays, positives, candidates, options, *, fixed):
    """The loss of one of eight devices that share their items, summed over them."""
    gather = functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True)
    options = options | {n: arrays[n] for n in ("scale", "bias")} | fixed
    options["hard"] = options["hard"]._replace(vectors=arrays["hard"])
    positives, items = positives._replace(vectors=arrays["items"]), gather(arrays["items"])
    candidates = Candidates(*map(gather, candidates))
    return jax.lax.psum(
        streaming_loss(arrays["queries"], positives, items, candidates, **options, block=8),
        "devices",
    )


def _on_eight(c: Case):
    """The function of the arrays, and the arrays: the batch cut into eight, temperature and bias
    everywhere."""
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    cut, whole = PartitionSpec("devices"), PartitionSpec()
    named = {n: c.options[n] for n in ("weights", "owners", "hard")}
    arrays = {
        "queries": c.queries,
        "items": c.positives.vectors,
        "hard": c.options["hard"].vectors,
        "scale": c.options["scale"],
        "bias": c.options["bias"],
    }
    fixed = {
        n: c.options[n]
        for n in ("loss", "constants", "margin", "positive_temperature", "mask_same_user")
    }
    of = functools.partial(_gathered_loss, fixed=fixed)
    specs = {n: whole if n in ("scale", "bias") else cut for n in arrays}
    sharded = jax.shard_map(
        of, mesh=mesh, in_specs=(specs, cut, cut, cut), out_specs=whole, check_vma=True
    )
    return (lambda arrays: sharded(arrays, c.positives, c.candidates, named)), arrays


@pytest.mark.parametrize("name", ["softmax", "corrected_softmax", "sigmoid"])
def test_eight_devices_equal_one(name):
    """Queries local, items gathered: loss and every gradient, in float64, with everything on but
    padding."""
    with jax.enable_x64(True):
        c = case(name, jnp.float64, size=24, others=0)
        eight, arrays = _on_eight(c)

        def one(a: dict) -> jax.Array:
            options = c.options | {n: a[n] for n in ("scale", "bias")}
            options["hard"] = options["hard"]._replace(vectors=a["hard"])
            return naive_loss(
                a["queries"],
                c.positives._replace(vectors=a["items"]),
                a["items"],
                c.candidates,
                **options,
            )

        _assert_close(
            jax.jit(jax.value_and_grad(eight))(arrays), jax.jit(jax.value_and_grad(one))(arrays)
        )


def _computation(text: str, name: str) -> str:
    """The body of an HLO computation, with those of the computations that it calls."""
    found = re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S).group(0)
    called = set(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", found))
    return found + "".join(_computation(text, other) for other in called)


def test_no_collective_in_the_loop_and_no_matrix_of_scores():
    """Read off the compiled value and gradient on eight devices: 64 queries each, 512 candidates,
    blocks of 8."""
    eight, arrays = _on_eight(case("softmax", size=512, others=0, width=4))
    text = jax.jit(jax.value_and_grad(eight)).lower(arrays).compile().as_text()
    collective = re.compile(r"all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all")
    bodies = re.findall(r"body=%?([\w.\-]+)", text)
    assert bodies and collective.search(text)
    assert not any(collective.search(_computation(text, body)) for body in bodies)
    largest = max(
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    )
    assert largest < 64 * 512
