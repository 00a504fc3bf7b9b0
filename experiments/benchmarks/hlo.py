"""Reads a compiled program: what its devices say to each other, what it multiplies, and how large
its arrays are.

The text is that of `compiled.as_text()`, in which shapes are those of one device. Loops count as
often as they run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
# Bytes of a number, where they are not 4.
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|c\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)


class Shape(NamedTuple):
    """An array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        return self.size * _BYTES.get(self.dtype, 4)


class Instruction(NamedTuple):
    """One line of the program.

    Attributes:
        shapes: Of its result, several where it is a tuple.
        rest: What follows the name of the operation.
    """

    name: str
    shapes: tuple[Shape, ...]
    kind: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition("), ")[0])


class Collective(NamedTuple):
    """An exchange between devices, at one line of the program.

    Attributes:
        shapes: Of the whole: what a device has after it was gathered, or before it is scattered.
        times: How often a step does it.
        in_loop: Whether it is in the body of a loop.
    """

    kind: str
    shapes: tuple[Shape, ...]
    times: int
    in_loop: bool

    @property
    def nbytes(self) -> int:
        """Returns the size of the whole array."""
        return sum(shape.nbytes for shape in self.shapes)

    def sent(self, devices: int) -> float:
        """Bytes that each device sends, and receives, where the devices form a ring: (n - 1) / n of
        the whole to gather or to scatter it; an all-reduce is both."""
        return (
            self.times
            * self.nbytes
            * (devices - 1)
            / devices
            * (2 if self.kind == "all-reduce" else 1)
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: Name -> its lines.
        times: Name -> how often it runs; of a loop that nobody knows the length of, once.
        looped: The names of those that are in the body of a loop.
    """

    computations: dict[str, list[Instruction]]
    times: dict[str, int]
    looped: frozenset[str]

    @property
    def instructions(self) -> Iterator[Instruction]:
        return (line for lines in self.computations.values() for line in lines)

    def shapes(self) -> set[Shape]:
        """Every array that the program ever forms, those within fused operations too."""
        return {shape for line in self.instructions for shape in line.shapes}

    def collectives(self) -> list[Collective]:
        """In the order of the text."""
        found = []
        for name, lines in self.computations.items():
            known = {line.name: line.shapes for line in lines}
            for line in lines:
                kind = line.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                given = tuple(
                    shape for operand in line.operands for shape in known.get(operand, ())
                )
                result = (
                    line.shapes[len(given) :] if len(line.shapes) > len(given) else line.shapes
                )  # "-start" has both
                whole = max(given, result, key=lambda shapes: sum(shape.nbytes for shape in shapes))
                found.append(Collective(kind, whole, self.times.get(name, 0), name in self.looped))
        return found

    def flops(self) -> int:
        """Returns the operations of the matrix products: 2 for each multiplication of two numbers
        and its addition."""
        total = 0
        for name, lines in self.computations.items():
            known = {line.name: line.shapes for line in lines}
            for line in lines:
                if line.kind == "dot":
                    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
                    assert contracted, "every product names the axes that it sums over"
                    left = known[line.operands[0]][0].dims
                    inner = math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)
                    total += 2 * line.shapes[0].size * inner * self.times.get(name, 0)
        return total


def read(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for row in text.splitlines():
        if header := _HEADER.match(row):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(row):
            shapes = (
                Shape(dtype, tuple(map(int, dims.split(",") if dims else ())))
                for dtype, dims in _SHAPE.findall(found[2])
            )
            lines.append(Instruction(found[1], tuple(shapes), found[3], found[4]))
    times: dict[str, int] = {}
    looped: set[str] = set()
    _count(computations, entry, 1, False, times, looped)
    return Program(computations, times, frozenset(looped))


def _count(
    computations: dict[str, list[Instruction]],
    name: str,
    often: int,
    inside: bool,
    times: dict[str, int],
    looped: set[str],
) -> None:
    """Adds that `name` runs so `often`, and all that it calls."""
    times[name] = times.get(name, 0) + often
    if inside:
        looped.add(name)
    for line in computations[name]:
        is_loop = line.kind == "while"
        trips = re.search(r"known_trip_count[^\d}]*(\d+)", line.rest) if is_loop else None
        branches = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
        called = _CALLED.findall(line.rest) + (
            re.findall(r"[\w.\-]+", branches[1]) if branches else []
        )
        for other in called:
            if other in computations:
                _count(
                    computations,
                    other,
                    often * (int(trips[1]) if trips else 1),
                    inside or is_loop,
                    times,
                    looped,
                )
