"""What a program costs, read from its trace alone: operations, bytes moved and sent, memory.

Nothing is compiled, so that any number of devices of any kind can be planned for on any machine. A
trace says less than a compiled program: which operations a compiler fuses is assumed. Elementwise
operations are taken to be fused into those that read them, unless a product, a gather, a sort, a
loop or an exchange between devices reads their result, which must then lie in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Exchanges between devices, by the passes over the ring of the whole array that they take.
_RING_PASSES = {
    "all_gather": 1,
    "all_gather_invariant": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    # A reduce-scatter and an all-gather.
    "psum": 2,
    "psum_invariant": 2,
}
# Their bodies run many times, and are costed apart.
_LOOPS = ("scan", "while")
# The same bytes under another shape.
_VIEWS = ("reshape", "squeeze", "expand_dims", "pvary", "pcast", "copy", "optimization_barrier")
# They read fused operands, and write their result.
_REDUCTIONS = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "argmax",
    "argmin",
)
# They read operands from memory, and write their result.
_WHOLE = (
    "dot_general",
    "sort",
    "top_k",
    "concatenate",
    "optimization_barrier",
    "cumsum",
    "cummax",
    "cumlogsumexp",
    "conv_general_dilated",
    "cond",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a device does and holds in a run of a program.

    Attributes:
        flops: Operations of matrix products.
        moved: Bytes read from memory and written to it.
        sent: Bytes that the device sends to others, in a ring.
        peak: Bytes of the arrays that the program makes, at the moment when they are most.
        blocks: Those of `peak` that lie within a loop, such as a block of the loss.
    """

    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    peak: float = 0.0
    blocks: float = 0.0


class Target(NamedTuple):
    """What a program is meant for.

    Attributes:
        devices: Number of devices that exchange arrays.
        platform: "cpu", or empty for an accelerator, where the program differs between them.
    """

    devices: int = 1
    platform: str = ""


class _Operation(NamedTuple):
    """An operation of a program whose calls are written out.

    Attributes:
        kind: Name of the primitive.
        reads: Numbers of the arrays that it reads.
        writes: Numbers of those that it makes.
        params: Parameters of the primitive.
    """

    kind: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program as a list of operations.

    Attributes:
        inputs: Numbers of its arguments and constants.
        outputs: Numbers of its results.
        avals: Shape and type of each array, by its number.
        operations: The operations, in their order.
        written_over: Result -> argument whose memory it takes.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    avals: list[Any]
    operations: list[_Operation]
    written_over: dict[int, int]


def read_cost(traced: ClosedJaxpr, target: Target, *, donated: int = 0) -> Cost:
    """Returns the cost of a traced program, on one device.

    Args:
        traced: Result of `jax.make_jaxpr`, of a `shard_map` or of a program of one device.
        target: Devices that it is meant for.
        donated: Number of its first arguments that its first results are written over.
    """
    jaxpr = traced.jaxpr
    first = len(jaxpr.constvars)
    # A program of one device has no shard_map around it.
    if len(jaxpr.eqns) == 1 and jaxpr.eqns[0].primitive.name == "shard_map":
        # Shapes within it are those of one device. Constants that were hoisted come first.
        inputs = len(jaxpr.invars)
        jaxpr = jaxpr.eqns[0].params["jaxpr"]
        first = len(jaxpr.constvars) + len(jaxpr.invars) - inputs
    carried = {index: first + index for index in range(donated)}
    return _cost(_write_out(jaxpr, target, carried), target)


def _write_out(jaxpr: Jaxpr, target: Target, carried: dict[int, int]) -> _Program:
    """Returns a program with the bodies of its calls in their place.

    Args:
        jaxpr: The program.
        target: Devices that it is meant for.
        carried: Index of a result -> index of the argument that it is written over.
    """
    avals: list[Any] = []
    operations: list[_Operation] = []

    def new(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def write(jaxpr: Jaxpr, arguments: Sequence[int]) -> list[int]:
        variables = [*jaxpr.constvars, *jaxpr.invars]
        numbers = dict(zip(variables, arguments, strict=True))

        def number_of(atom: Any) -> int:
            # A number within the program is no variable, and nobody else reads it.
            if isinstance(atom, Literal):
                return new(atom.aval)
            return numbers[atom]

        for equation in jaxpr.eqns:
            reads = [number_of(atom) for atom in equation.invars]
            called = _called(equation, target.platform)
            # Calls are written out, since a compiler fuses across them and memory is reused across
            # them.
            if called is None:
                writes = [new(var.aval) for var in equation.outvars]
                kind = equation.primitive.name
                operations.append(_Operation(kind, tuple(reads), tuple(writes), equation.params))
            else:
                body, skipped = called
                constants = [new(var.aval) for var in body.constvars]
                writes = write(body, [*constants, *reads[skipped:]])
            numbers.update(zip(equation.outvars, writes, strict=True))
        return [number_of(atom) for atom in jaxpr.outvars]

    inputs = [new(var.aval) for var in [*jaxpr.constvars, *jaxpr.invars]]
    outputs = write(jaxpr, inputs)
    written_over = {outputs[index]: inputs[other] for index, other in carried.items()}
    return _Program(tuple(inputs), tuple(outputs), avals, operations, written_over)


def _called(equation: Any, platform: str) -> tuple[Jaxpr, int] | None:
    """Returns the body that an operation runs once, and the number of operands before its own; None
    for any other."""
    name = equation.primitive.name
    # Bodies of reductions and scatters join two numbers.
    if name in _LOOPS or name.startswith(("reduce", "scatter")):
        return None
    # Of a choice by platform one branch is compiled; a choice by numbers is costed where it stands.
    if name == "cond":
        platforms = equation.params.get("branches_platforms") or ()
        for branch, names in zip(equation.params["branches"], platforms):
            # The default has no names, and comes last.
            if names is None or platform in names:
                return branch.jaxpr, 1
        return None
    bodies = list(_bodies(equation.params))
    # A call whose operands are not those of its body one by one cannot be put in its place.
    if len(bodies) != 1 or len(bodies[0].invars) != len(equation.invars):
        return None
    return bodies[0], 0


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _bytes(aval: Any) -> int:
    # Keys of random numbers have a type of their own, of two words.
    itemsize = getattr(aval.dtype, "itemsize", 8)
    return math.prod(aval.shape) * itemsize


def _cost(program: _Program, target: Target) -> Cost:
    """Returns the cost of a program: see the assumptions above."""
    sizes = [_bytes(aval) for aval in program.avals]
    stored = _stored(program)
    sources = _sources(program, stored)
    storage = _storage(program)
    last_use = _last_uses(program, stored, sources, storage)
    flops = moved = sent = 0.0
    live = peak = blocks = 0.0
    # Arguments are counted by whoever holds them.
    allocated = set(program.inputs)
    # Number of an operation -> arrays whose memory is free after it.
    ends: dict[int, list[int]] = {}
    for number, operation in enumerate(program.operations):
        inner = _inner(operation, target)
        flops += _flops(operation, program.avals) + inner.flops
        moved += _moved(operation, sizes, stored, sources) + inner.moved
        sent += _sent(operation, sizes, target.devices) + inner.sent
        dying = ends.setdefault(number, [])
        for output in operation.writes:
            memory = storage[output]
            # A view and a result that is written over another take no memory of their own.
            if output not in stored or memory in allocated:
                continue
            allocated.add(memory)
            reused = None
            # An accelerator writes an elementwise result over an operand that nothing else needs;
            # on a CPU none was seen to.
            if _is_fused(operation.kind) and not target.platform:
                equal = (other for other in dying if sizes[other] == sizes[memory])
                reused = next(equal, None)
            # Of a reused operand the memory stays taken, under another name.
            if reused is None:
                live += sizes[memory]
            else:
                dying.remove(reused)
            last = max(last_use.get(memory, number), number)
            ends.setdefault(last, []).append(memory)
        # Before what dies here is freed: an operation holds its operands and its results at once.
        if live + inner.peak > peak:
            peak = live + inner.peak
            blocks = inner.peak
        live -= sum(sizes[memory] for memory in ends.pop(number, ()))
    return Cost(flops, moved, sent, peak, blocks)


def _is_fused(kind: str) -> bool:
    """Returns whether an operation computes its result where it is read."""
    if kind in (*_WHOLE, *_REDUCTIONS, *_LOOPS, *_RING_PASSES):
        return False
    return not kind.startswith(("gather", "scatter", "dynamic"))


def _stored(program: _Program) -> set[int]:
    """Returns the arrays that lie in memory."""
    stored = {*program.inputs, *program.outputs}
    for operation in program.operations:
        if _is_fused(operation.kind):
            continue
        stored.update(operation.writes)
        # A reduction reads fused operands one by one, so that they need never be whole.
        if operation.kind not in _REDUCTIONS:
            stored.update(operation.reads)
    return stored


def _sources(program: _Program, stored: set[int]) -> dict[int, frozenset[int]]:
    """Returns the arrays in memory that each array is computed from."""
    sources: dict[int, frozenset[int]] = {}
    for operation in program.operations:
        joined = _read_sources(operation, stored, sources)
        for output in operation.writes:
            sources[output] = joined
    return sources


def _read_sources(
    operation: _Operation, stored: set[int], sources: dict[int, frozenset[int]]
) -> frozenset[int]:
    """Returns the arrays in memory that an operation reads."""
    joined: set[int] = set()
    for read in operation.reads:
        if read in stored:
            joined.add(read)
        else:
            # A literal has no source.
            joined |= sources.get(read, frozenset())
    return frozenset(joined)


def _storage(program: _Program) -> dict[int, int]:
    """Returns the array whose memory each one takes: a scatter, and the carry of a loop, write into
    the array that they are given."""
    storage = {number: number for number in range(len(program.avals))}
    # In order: an array that is written into one which took another's memory takes that one's.
    storage |= program.written_over
    for operation in program.operations:
        reads = operation.reads
        if operation.kind.startswith(("scatter", "dynamic_update_slice")):
            pairs = [(operation.writes[0], reads[0])]
        elif operation.kind in _VIEWS:
            pairs = list(zip(operation.writes, reads))
        elif operation.kind in _LOOPS:
            _, carried = _carried(operation)
            pairs = [(operation.writes[index], reads[other]) for index, other in carried.items()]
        else:
            continue
        for output, read in pairs:
            storage[output] = storage[read]
    return storage


def _carried(operation: _Operation) -> tuple[int, dict[int, int]]:
    """Returns the number of operands of a loop before those of its body, and, of what it carries,
    index of the result -> index of the operand."""
    params = operation.params
    if operation.kind == "scan":
        if "num_consts" in params:
            constants = params["num_consts"]
            carry = params["num_carry"]
        else:
            # Newer versions of JAX keep the trees of what a scan reads in the place of counts.
            constants, carry, _ = (len(tree.vals) for tree in params["ft_in"].unpack())
        return 0, {index: constants + index for index in range(carry)}
    before = params["cond_nconsts"]
    constants = before + params["body_nconsts"]
    return before, {index: constants + index for index in range(len(operation.writes))}


def _last_uses(
    program: _Program,
    stored: set[int],
    sources: dict[int, frozenset[int]],
    storage: dict[int, int],
) -> dict[int, int]:
    """Returns the number of the last operation that needs the memory of each array."""
    last: dict[int, int] = {}
    for number, operation in enumerate(program.operations):
        # What is fused reads when its result is read.
        if _is_fused(operation.kind) and not stored.intersection(operation.writes):
            continue
        for read in _read_sources(operation, stored, sources):
            last[storage[read]] = number
    # Results outlive the program, so that nothing is written over them.
    for output in program.outputs:
        last[storage[output]] = len(program.operations)
    return last


def _inner(operation: _Operation, target: Target) -> Cost:
    """Returns the cost of the rounds of a loop, or of the dearer branch of a condition."""
    if operation.kind == "cond":
        branches = [branch.jaxpr for branch in operation.params["branches"]]
        costs = [_cost(_write_out(branch, target, {}), target) for branch in branches]
        # Which one runs is known to the device alone: the dearer one promises nothing in vain.
        return max(costs, key=lambda cost: cost.moved + cost.flops)
    if operation.kind not in _LOOPS:
        return Cost()
    name = "jaxpr" if operation.kind == "scan" else "body_jaxpr"
    body = operation.params[name].jaxpr
    before, carried = _carried(operation)
    carried = {index: other - before for index, other in carried.items()}
    cost = _cost(_write_out(body, target, carried), target)
    # Of a loop whose length depends on numbers, one round is counted.
    rounds = operation.params.get("length", 1)
    # The peak is that of one round: the next one takes the same memory.
    return Cost(cost.flops * rounds, cost.moved * rounds, cost.sent * rounds, cost.peak)


def _flops(operation: _Operation, avals: list[Any]) -> float:
    """Returns the operations of a product: 2 for each multiplication and its addition."""
    if operation.kind != "dot_general":
        return 0.0
    (contracted, _), _ = operation.params["dimension_numbers"]
    # The shape of the product has what is left of both operands; what is summed over is gone from
    # it.
    left = avals[operation.reads[0]].shape
    inner = math.prod(left[axis] for axis in contracted)
    return 2.0 * math.prod(avals[operation.writes[0]].shape) * inner


def _moved(
    operation: _Operation,
    sizes: list[int],
    stored: set[int],
    sources: dict[int, frozenset[int]],
) -> float:
    """Returns the bytes that an operation reads from memory and writes to it."""
    kind = operation.kind
    # What loops read and write is counted inside.
    if kind in (*_LOOPS, "cond"):
        return 0.0
    written = sum(sizes[output] for output in operation.writes if output in stored)
    # Of a table of 100 GB a step reads a few rows, not all of it.
    if kind.startswith(("gather", "dynamic_slice")):
        # Rows alone are read of the array that they are taken from.
        return 2 * written + sizes[operation.reads[1]]
    if kind.startswith("scatter"):
        # Rows alone are read and written of the array that they are put into.
        indices, updates = operation.reads[1:3]
        return sizes[indices] + 3 * sizes[updates]
    if kind.startswith("dynamic_update_slice"):
        return 2 * sizes[operation.reads[1]]
    is_view = kind in _VIEWS and stored.issuperset(operation.reads)
    # What is fused, or only renamed, is paid for by those that read it.
    if is_view or not written:
        return 0.0
    read = sum(sizes[source] for source in _read_sources(operation, stored, sources))
    return written + read


def _sent(operation: _Operation, sizes: list[int], devices: int) -> float:
    """Returns the bytes that a device sends in a ring: (n - 1) / n of the whole array, once to
    gather or to scatter it and twice to sum it."""
    passes = _RING_PASSES.get(operation.kind, 0)
    read = sum(sizes[number] for number in operation.reads)
    written = sum(sizes[number] for number in operation.writes)
    # The whole array is the larger of both: gathered it is the result, scattered the operand.
    return passes * max(read, written) * (devices - 1) / devices
