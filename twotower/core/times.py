"""Units of time."""

from __future__ import annotations

from typing import Literal

TimeUnit = Literal["s", "ms", "us", "ns"]

# Integers, so that nanoseconds are divided without rounding.
UNITS_PER_SECOND: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
