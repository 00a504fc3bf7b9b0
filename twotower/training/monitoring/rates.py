"""What a training reaches of its devices' peaks: arithmetic (MFU) and bytes of memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax

from twotower.core.errors import choose
from twotower.training.planning.costs import Cost
from twotower.training.planning.peaks import CHIPS

# What JAX calls the devices; the first that fits decides.
_NAMES = (
    (re.compile(r"TPU v5p?$"), "v5p"),
    (re.compile(r"TPU v6"), "v6e"),
    (re.compile(r"TPU ?v?7"), "ironwood"),
    (re.compile(r"H100"), "h100"),
    (re.compile(r"H200"), "h200"),
    (re.compile(r"B200"), "b200"),
)


def find_kind(name: str, kind: str = "") -> str:
    """Returns the key of `CHIPS` that devices are of; "" where their peak is not known.

    >>> find_kind("NVIDIA H200"), find_kind("TPU v6 lite"), find_kind("cpu")
    ('h200', 'v6e', '')

    Args:
        name: Name that JAX has for the devices.
        kind: Kind that the user gives in its place; "" for none.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind:
        choose(CHIPS, kind, "--kind")
        return kind
    # A part of a card reaches a part of its peak.
    if "MIG" in name:
        return ""
    for pattern, found in _NAMES:
        if pattern.search(name):
            return found
    return ""


def device_name() -> str:
    """Returns the name that JAX has for the devices of this process."""
    return jax.local_devices()[0].device_kind


@dataclasses.dataclass(frozen=True)
class Rates:
    """Work of a step against what the devices can do.

    Attributes:
        kind: Kind of the devices, a key of `CHIPS`.
        dtype: Type of the products.
        cost: What a device does in a step, as `twotower.training.planning` reads it.
    """

    kind: str
    dtype: str
    cost: Cost

    def of_step(self, seconds: float) -> Mapping[str, float]:
        """Returns the rates of a step.

        Args:
            seconds: Seconds of the step, without validations and checkpoints.

        Returns:
            "mfu", the share of the peak of bfloat16 products that the model's own products reach
            (of float32 ones where the model has these), "bytes_per_second" between each device and
            its memory, and "bandwidth", its share of the peak.
        """
        chip = CHIPS[self.kind]
        # A chip may be several devices of JAX, and the cost is that of one.
        flops = chip.flops / chip.devices
        if self.dtype == "float32":
            flops *= chip.float32
        moved = self.cost.moved / seconds
        return {
            "mfu": self.cost.flops / seconds / flops,
            "bytes_per_second": moved,
            "bandwidth": moved * chip.devices / chip.bandwidth,
        }
