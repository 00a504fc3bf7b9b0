"""What accelerators can do at most, in one table."""

from __future__ import annotations

import dataclasses

GIB = 2**30
GB = 10**9

# Share of a peak that programs of this kind reach: on an H200 products of 8,192 x 8,192 in bfloat16
# ran at 663 to 714 of 989 TFLOP/s, and memory at 3,225 of 4,800 GB/s
# (experiments/benchmarks/RESULTS.md). Nothing was measured on the others.
SUSTAINED = 0.67


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator as it is rented.

    Attributes:
        flops: Greatest number of operations of bfloat16 products in a second.
        float32: Share of `flops` that products of float32 reach in JAX's default precision.
        memory: Bytes of memory.
        bandwidth: Bytes a second between the chip and its memory.
        network: Bytes a second that a device of a ring sends to the others, of one slice or host.
        usable: Share of the memory that JAX allocates from by default.
        source: Where the numbers are from.
        devices: Number of devices that JAX sees in a chip, which share all of the above but the
            network.
        near: Number of devices that `network` holds for; 0 for any number.
        far_network: Bytes a second that a device sends where there are more than `near`.
    """

    flops: float
    float32: float
    memory: float
    bandwidth: float
    network: float
    usable: float
    source: str
    devices: int = 1
    near: int = 0
    far_network: float = 0.0

    def ring(self, devices: int) -> float:
        """Returns the bytes a second that a device of a ring of so many sends."""
        # Within a host GPUs talk by NVLink; the slowest link of a ring that leaves it bounds them
        # all.
        if self.near and devices > self.near:
            return self.far_network
        return self.network


# The links of a TPU carry 100 GB/s each way (its page: 1,200 GB/s both ways of the six of a v5p)
# and a ring takes two of a chip's. NVLink 4 carries 900 GB/s both ways together (nvidia.com, Hopper
# architecture), NVLink 5 twice that; between hosts each GPU has a ConnectX-7 of 400 Gb/s.
# TensorFloat-32 of a GPU has half of the peak of bfloat16; a TPU multiplies float32 in bfloat16
# unless told otherwise. JAX allocates three quarters of a GPU (XLA_PYTHON_CLIENT_MEM_FRACTION).
CHIPS = {
    "v5p": Chip(
        flops=459e12,
        float32=1.0,
        memory=95 * GIB,
        bandwidth=2_765 * GB,
        network=200 * GB,
        usable=0.95,
        source="cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        flops=918e12,
        float32=1.0,
        memory=32 * GIB,
        bandwidth=1_638 * GB,
        network=200 * GB,
        usable=0.95,
        source="cloud.google.com/tpu/docs/v6e",
    ),
    "ironwood": Chip(
        flops=2_307e12,
        float32=1.0,
        memory=192 * GIB,
        bandwidth=7_380 * GB,
        network=200 * GB,
        usable=0.95,
        source="cloud.google.com/tpu/docs/tpu7x",
        # Two chiplets, each a device with half of the chip's arithmetic and memory.
        devices=2,
    ),
    "h100": Chip(
        flops=989e12,
        float32=0.5,
        memory=80 * GB,
        bandwidth=3_350 * GB,
        network=450 * GB,
        usable=0.75,
        source="nvidia.com/en-us/data-center/h100 (SXM)",
        near=8,
        far_network=50 * GB,
    ),
    "h200": Chip(
        flops=989e12,
        float32=0.5,
        memory=141 * GB,
        bandwidth=4_800 * GB,
        network=450 * GB,
        usable=0.75,
        source="nvidia.com/en-us/data-center/h200 (SXM)",
        near=8,
        far_network=50 * GB,
    ),
    "b200": Chip(
        flops=2_250e12,
        float32=0.5,
        memory=180 * GB,
        bandwidth=7_670 * GB,
        network=900 * GB,
        usable=0.75,
        source="nvidia.com/en-us/data-center/dgx-b200",
        near=8,
        far_network=50 * GB,
    ),
}
