"""The losses of `twotower.kernels.streaming_softmax` on a GPU, by kernels that write no logits.

A loss of the softmax kind knows a query's candidates by one number, the log of their summed
exponentials. This number and its gradients are computed here by two Pallas kernels, which Triton
compiles; positives, hard negatives and the loss itself are a few numbers a query, left to XLA.

The first kernel holds a tile of queries and walks over all candidates, as FlashAttention does (Dao
et al. 2022, arXiv 2205.14135): it keeps the greatest logit, the sum of exponentials and, if
gradients are asked for, the candidates' mean weighted by them, which is the gradient by the query.
The second holds a tile of candidates and walks over all queries: it forms the logits again and
takes the known logarithm off, which leaves probabilities. Four matrix products take the place of
the three of the blocks, and of [B, C] nothing is written.

Logits are in bits here, not in nats: a GPU has an instruction for 2^x, and none for e^x.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from twotower.kernels.softmax_blocks import GradientInputs, KernelOptions, LossIds

_BITS = 1.0 / math.log(2.0)  # in a nat
# Below all logits, and finite: the difference of two infinities is no number.
_LOWEST = -1e38
MAX_WIDTH = 256
# Triton's products take at least this many columns, and powers of two.
_MIN_WIDTH = 16
# Offsets into an array are int32.
_MAX_ELEMENTS = 2**31 - 1
# Programs that keep a GPU busy: two for each of the 132 multiprocessors of an H100 or H200. A fixed
# number, so that sums are taken in the same order on every device.
_MIN_PROGRAMS = 264


class Tiles(NamedTuple):
    """The work of a program of the kernels, and how Triton divides it.

    Attributes:
        rows: Vectors that a program holds, queries or candidates; a power of two.
        columns: Vectors of the other kind that it compares them with at a time; a power of two.
        warps: Groups of 32 threads in a program.
        stages: Depth of the pipeline by which columns are loaded ahead, Triton's `num_stages`.
    """

    rows: int
    columns: int
    warps: int
    stages: int


# By the bytes of a vector that they serve, at most: operands, sums and logits must fit into the
# shared memory and the registers of a multiprocessor. Chosen by what Triton makes of the kernels
# for an H200, which is without spills, with two programs on each multiprocessor where vectors are
# short.
TILES = {
    128: Tiles(rows=128, columns=64, warps=4, stages=3),
    256: Tiles(rows=128, columns=64, warps=8, stages=3),
    512: Tiles(rows=128, columns=64, warps=8, stages=2),
    1024: Tiles(rows=64, columns=64, warps=8, stages=1),
}


class PallasOptions(NamedTuple):
    """Static options of the kernels.

    Attributes:
        dtype: Type of the operands of the matrix products.
        masks_users: Whether the candidates of a query's user are masked.
        interpret: Whether the kernels are run by Pallas's interpreter, on any backend.
    """

    dtype: DTypeLike
    masks_users: bool
    interpret: bool = False


class VectorsAndIds(NamedTuple):
    """Queries or candidates: N vectors, and the ids by which pairs of them are masked."""

    vectors: Float[Array, "N D"]
    # Of a query, the id of its positive.
    item_ids: Int[Array, "N"]
    # Of a candidate, the query (user) whose positive it is.
    query_ids: Int[Array, "N"]


def sum_of_losses(
    options: KernelOptions,
    arrays: GradientInputs,
    ids: LossIds,
    *,
    masks_users: bool,
    interpret: bool = False,
) -> Float[Array, ""]:
    """Sums weight x loss over all queries, for a loss with `KernelOptions.by_logit_margin`.

    Args:
        options: The loss, and the type of the products' operands.
        arrays: Inputs that the loss is differentiated by.
        ids: Ids and log expected counts.
        masks_users: Whether the candidates of a query's user are masked.
        interpret: Whether the kernels are run by Pallas's interpreter, on any backend.
    """
    dtype = _operand_type(options, arrays)
    pallas_options = PallasOptions(dtype, masks_users, interpret)
    # Scaled before the product instead of after it: a pass over [B, C] less.
    queries = arrays.queries * (arrays.scale * _BITS)
    log_sum = _log_sum_exp(pallas_options, queries, arrays.items, ids) / _BITS + arrays.bias
    # To such a loss all candidates are one negative, whose exponential is their sum.
    negatives = jnp.concatenate([log_sum[:, None], arrays.hard], axis=1)
    # -inf is a query without negatives; NaN counts, to be seen.
    has_candidates = log_sum != -jnp.inf
    where = jnp.concatenate([has_candidates[:, None], ids.hard_allowed], axis=1)
    losses = options.per_query(arrays.positive, negatives, where=where)
    return jnp.sum(arrays.weights * losses)


def is_usable(options: KernelOptions, arrays: GradientInputs, *, masks_users: bool) -> bool:
    """Returns whether the kernels serve these inputs on this backend; logs once why not.

    The kernels are compiled once for a width and a type, on few vectors, before they are used: a
    version of JAX or a device that cannot is then known before the step is compiled.
    """
    reason = _refusal(options, arrays)
    if not reason:
        dtype = jnp.dtype(_operand_type(options, arrays))
        width = arrays.queries.shape[1]
        reason = _compile_error(PallasOptions(dtype, masks_users), width)
    if reason:
        _log_once(reason)
    return not reason


def _operand_type(options: KernelOptions, arrays: GradientInputs) -> DTypeLike:
    return options.dtype or jnp.result_type(arrays.queries, arrays.items)


def _refusal(options: KernelOptions, arrays: GradientInputs) -> str:
    """Returns why the kernels cannot serve these inputs; empty if they can."""
    if options.by_logit_margin is None:
        return "the loss is no function of the negatives' summed exponentials"
    if jax.default_backend() != "gpu":
        return f"it runs on NVIDIA GPUs, and the backend is {jax.default_backend()}"
    dtype = jnp.dtype(_operand_type(options, arrays))
    if dtype not in (jnp.float32, jnp.bfloat16) or arrays.positive.dtype != jnp.float32:
        return f"it multiplies float32 or bfloat16 and sums float32, not {dtype}"
    width = arrays.queries.shape[1]
    if width > MAX_WIDTH:
        return f"vectors of width {width} are wider than {MAX_WIDTH}"
    longest = max(len(arrays.queries), len(arrays.items))
    if longest * _padded_width(width) > _MAX_ELEMENTS:
        return f"{longest:,} vectors of width {width} are more than an int32 counts"
    if not (len(arrays.queries) and len(arrays.items)):
        return "there is nothing to compare"
    return ""


@functools.cache
def _log_once(reason: str) -> None:
    logging.warning(
        "config.objective.softmax_kernel is 'pallas', but %s: the loss is computed by 'blocks'.",
        reason,
    )


@functools.cache
def _compile_error(options: PallasOptions, width: int) -> str:
    """Returns why the kernels do not compile or run, for vectors of a width; empty if they do."""
    # In a thread of its own: this one is tracing the step, whose mesh is none of the trial's.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        error = pool.submit(try_kernels, options, width).exception()
    if not error:
        return ""
    lines = str(error).splitlines() or [""]
    return f"its kernels fail here ({type(error).__name__}: {lines[0]})"


def try_kernels(options: PallasOptions, width: int) -> None:
    """Compiles and runs the kernels on a few vectors of a width."""

    def value(queries: jax.Array, items: jax.Array, ids: LossIds) -> jax.Array:
        return _log_sum_exp(options, queries, items, ids).sum()

    # Two tiles each way: what can fail depends on the tiles alone.
    tiles = _tiles(options, width)
    count = 2 * max(tiles.rows, tiles.columns)
    vectors = jnp.zeros((count, width))
    ids = jnp.zeros(count, jnp.int32)
    others = ids + 1
    allowed = jnp.zeros((count, 0), bool)
    loss_ids = LossIds(ids, ids, allowed, others, others, jnp.zeros(count))
    gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(vectors, vectors, loss_ids)
    jax.block_until_ready(gradients)


def _log_sum_exp_value(
    options: PallasOptions,
    queries: Float[Array, "B D"],
    items: Float[Array, "C D"],
    ids: LossIds,
) -> Float[Array, "B"]:
    """Returns the binary logarithm of each query's summed exponentials 2^logit over its allowed
    candidates; -inf for a query without any.

    Logits are query . item - log2 of the expected count.
    """
    sums, _ = _sum_exponentials(options, queries, items, ids, with_means=False)
    return sums


_log_sum_exp = jax.custom_vjp(_log_sum_exp_value, nondiff_argnums=(0,))


def _forward(
    options: PallasOptions, queries: jax.Array, items: jax.Array, ids: LossIds
) -> tuple[jax.Array, tuple]:
    sums, means = _sum_exponentials(options, queries, items, ids, with_means=True)
    return sums, (queries, items, ids, sums, means)


def _backward(
    options: PallasOptions, residuals: tuple, slopes: Float[Array, "B"]
) -> tuple[jax.Array, jax.Array, None]:
    queries, items, ids, sums, means = residuals
    item_gradients = _item_gradients(options, queries, items, ids, sums, slopes)
    return (slopes[:, None] * means).astype(queries.dtype), item_gradients, None


_log_sum_exp.defvjp(_forward, _backward)


class Layout(NamedTuple):
    """How rows are divided over programs, and columns over programs and their steps.

    Few rows leave multiprocessors idle: then several programs share a tile of rows, each with a
    part of the columns.
    """

    row_tiles: int
    parts: int
    # Columns of a part.
    part: int
    tiles: Tiles

    @property
    def rows(self) -> int:
        """Number of rows, with padding."""
        return self.row_tiles * self.tiles.rows

    @property
    def columns(self) -> int:
        """Number of columns, with padding."""
        return self.parts * self.part


def _layout(rows: int, columns: int, tiles: Tiles) -> Layout:
    row_tiles = pl.cdiv(rows, tiles.rows)
    column_tiles = pl.cdiv(columns, tiles.columns)
    steps = pl.cdiv(column_tiles, pl.cdiv(_MIN_PROGRAMS, row_tiles))
    return Layout(row_tiles, pl.cdiv(column_tiles, steps), steps * tiles.columns, tiles)


def _tiles(options: PallasOptions, width: int) -> Tiles:
    size = _padded_width(width) * jnp.dtype(options.dtype).itemsize
    fitting = (limit for limit in sorted(TILES) if size <= limit)
    return TILES[next(fitting)]


def _padded_width(width: int) -> int:
    return max(_MIN_WIDTH, pl.next_power_of_2(width))


def _pad(x: jax.Array, count: int, fill: float = 0) -> jax.Array:
    padding = [(0, count - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill)


def _pad_vectors(options: PallasOptions, vectors: jax.Array, count: int) -> jax.Array:
    """Returns vectors as operands: in their type, `count` of them, of a width for Triton."""
    missing = _padded_width(vectors.shape[1]) - vectors.shape[1]
    widened = jnp.pad(vectors.astype(options.dtype), [(0, 0), (0, missing)])
    return _pad(widened, count)


def _queries(options: PallasOptions, queries: jax.Array, ids: LossIds, count: int) -> VectorsAndIds:
    vectors = _pad_vectors(options, queries, count)
    return VectorsAndIds(vectors, _pad(ids.positives, count), _pad(ids.queries, count))


def _candidates(
    options: PallasOptions, items: jax.Array, ids: LossIds, count: int
) -> tuple[VectorsAndIds, jax.Array]:
    """Returns the candidates, and the number added to each one's scores, in bits; -inf for
    padding."""
    vectors = _pad_vectors(options, items, count)
    levels = jnp.where(ids.candidates >= 0, -ids.candidate_log_counts * _BITS, -jnp.inf)
    candidates = VectorsAndIds(
        vectors, _pad(ids.candidates, count), _pad(ids.candidate_queries, count)
    )
    return candidates, _pad(levels, count, -jnp.inf)


def _sum_exponentials(
    options: PallasOptions, queries: jax.Array, items: jax.Array, ids: LossIds, *, with_means: bool
) -> tuple[Float[Array, "B"], Float[Array, "B D"] | None]:
    """Returns `_log_sum_exp` and, if `with_means`, the mean candidate of each query, weighted by
    the exponentials."""
    count, width = queries.shape
    layout = _layout(count, len(items), _tiles(options, width))
    rows = _queries(options, queries, ids, layout.rows)
    columns, levels = _candidates(options, items, ids, layout.columns)
    shape = (layout.parts, layout.rows)
    shapes: list[tuple[int, ...]] = [shape]
    if with_means:
        shapes.append((*shape, _padded_width(width)))
    kernel = functools.partial(_sum_kernel, options, layout)
    sums, *means = _call(options, layout, kernel, (rows,), (columns, levels), shapes)
    # Joins the parts, of which there is one where rows are many.
    top = sums.max(axis=0)
    # Without any candidate: 0 keeps -inf - -inf out of the exponentials.
    top = jnp.where(top == -jnp.inf, 0.0, top)
    shares = jnp.exp2(sums - top[None, :])
    total = shares.sum(axis=0)
    log_sums = (top + jnp.log2(total))[:count]
    if not with_means:
        return log_sums, None
    weights = shares / jnp.where(total == 0, 1.0, total)[None, :]
    mean = jnp.einsum("pr,prd->rd", weights, means[0], precision=jax.lax.Precision.HIGHEST)
    return log_sums, mean[:count, :width]


def _item_gradients(
    options: PallasOptions,
    queries: jax.Array,
    items: jax.Array,
    ids: LossIds,
    sums: Float[Array, "B"],
    slopes: Float[Array, "B"],
) -> Float[Array, "C D"]:
    """Returns the gradient by the items of the sum of slope x `_log_sum_exp`, whose values are
    `sums`."""
    count, width = items.shape
    layout = _layout(count, len(queries), _tiles(options, width))
    rows, levels = _candidates(options, items, ids, layout.rows)
    columns = _queries(options, queries, ids, layout.columns)
    # Weighed here instead of their probabilities: a pass over [B, C] less.
    weighted = _pad_vectors(options, slopes[:, None] * queries, layout.columns)
    # Queries without candidates, and padding: no exponential is left of what is less infinity.
    offsets = _pad(jnp.where(sums == -jnp.inf, jnp.inf, sums), layout.columns, jnp.inf)
    shapes: list[tuple[int, ...]] = [(layout.parts, layout.rows, rows.vectors.shape[1])]
    kernel = functools.partial(_gradient_kernel, options, layout)
    (parts,) = _call(options, layout, kernel, (rows, levels), (columns, offsets, weighted), shapes)
    return parts.sum(axis=0)[:count, :width].astype(items.dtype)


def _call(
    options: PallasOptions,
    layout: Layout,
    kernel: Callable[..., None],
    rows: tuple,
    columns: tuple,
    shapes: list[tuple[int, ...]],
) -> Sequence[jax.Array]:
    """Runs a kernel for each tile of rows and each part of the columns.

    Args:
        options: Static options.
        layout: Division of rows and columns.
        kernel: Function of the references to rows, columns and outputs.
        rows: Arrays with an entry for each row.
        columns: Arrays with an entry for each column.
        shapes: Shapes of the outputs, [parts, rows, ...].
    """

    def specs(trees: tuple, length: int, axis: int) -> tuple:
        def spec(x: jax.Array) -> pl.BlockSpec:
            rest = (0,) * (x.ndim - 1)
            return pl.BlockSpec((length, *x.shape[1:]), lambda *block: (block[axis], *rest))

        return jax.tree.map(spec, trees)

    def out_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        rest = (0,) * (len(shape) - 2)
        block = (None, layout.tiles.rows, *shape[2:])
        return pl.BlockSpec(block, lambda tile, part: (part, tile, *rest))

    def out_shape(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        # Derived from an input, so that it varies over a mesh as that does.
        number = jax.tree.leaves(rows)[0][0, 0].astype(jnp.float32)
        return jax.eval_shape(lambda x: jnp.broadcast_to(x, shape), number)

    tiles = layout.tiles
    return pl.pallas_call(
        kernel,
        grid=(layout.row_tiles, layout.parts),
        in_specs=(*specs(rows, tiles.rows, 0), *specs(columns, layout.part, 1)),
        out_specs=[out_spec(shape) for shape in shapes],
        out_shape=[out_shape(shape) for shape in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=options.interpret,
    )(*rows, *columns)


def _masked_scores(
    options: PallasOptions, rows: VectorsAndIds, columns: VectorsAndIds
) -> jax.Array:
    """Returns the dot products of rows and columns; -inf where a candidate is no negative."""
    scores = plgpu.dot(rows.vectors, columns.vectors, trans_b=True)
    masked = rows.item_ids[:, None] == columns.item_ids[None, :]
    if options.masks_users:
        masked |= rows.query_ids[:, None] == columns.query_ids[None, :]
    return jnp.where(masked, -jnp.inf, scores)


def _load(refs: VectorsAndIds, first: int | jax.Array, count: int) -> VectorsAndIds:
    at = pl.ds(first, count)
    return VectorsAndIds(refs.vectors[at, :], refs.item_ids[at], refs.query_ids[at])


def _sum_kernel(options: PallasOptions, layout: Layout, row_refs, column_refs, levels, *outputs):
    """Writes the binary logarithm of the summed exponentials of a tile of queries over a part of
    the candidates, and their weighted mean where there is a second output."""
    with_means = len(outputs) > 1
    rows = _load(row_refs, 0, layout.tiles.rows)

    def add_columns(step: jax.Array, sums: tuple) -> tuple:
        top, total, mean = sums
        first = step * layout.tiles.columns
        columns = _load(column_refs, first, layout.tiles.columns)
        at = pl.ds(first, layout.tiles.columns)
        logits = _masked_scores(options, rows, columns) + levels[at][None, :]
        new_top = jnp.maximum(top, logits.max(axis=1))
        exponentials = jnp.exp2(logits - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + exponentials.sum(axis=1)
        if with_means:
            product = plgpu.dot(exponentials.astype(columns.vectors.dtype), columns.vectors)
            mean = mean * shrink[:, None] + product
        return new_top, total, mean

    lowest = jnp.full(layout.tiles.rows, _LOWEST, jnp.float32)
    zero = jnp.zeros(layout.tiles.rows, jnp.float32)
    start = (lowest, zero, jnp.zeros(rows.vectors.shape, jnp.float32) if with_means else zero)
    steps = layout.part // layout.tiles.columns
    top, total, mean = jax.lax.fori_loop(0, steps, add_columns, start)
    none = total == 0
    # 1 avoids log 0 and 0 / 0.
    total = jnp.where(none, 1.0, total)
    outputs[0][...] = jnp.where(none, -jnp.inf, top + jnp.log2(total))
    if with_means:
        outputs[1][...] = mean / total[:, None]


def _gradient_kernel(
    options: PallasOptions, layout: Layout, row_refs, levels, column_refs, offsets, weighted, output
):
    """Writes the gradient by a tile of candidates of the loss of a part of the queries."""
    rows = _load(row_refs, 0, layout.tiles.rows)
    level = levels[...]

    def add_columns(step: jax.Array, gradient: jax.Array) -> jax.Array:
        first = step * layout.tiles.columns
        columns = _load(column_refs, first, layout.tiles.columns)
        at = pl.ds(first, layout.tiles.columns)
        logits = _masked_scores(options, rows, columns) + level[:, None]
        probabilities = jnp.exp2(logits - offsets[at][None, :])
        slopes = weighted[at, :]
        return gradient + plgpu.dot(probabilities.astype(slopes.dtype), slopes)

    start = jnp.zeros(rows.vectors.shape, jnp.float32)
    output[...] = jax.lax.fori_loop(0, layout.part // layout.tiles.columns, add_columns, start)
