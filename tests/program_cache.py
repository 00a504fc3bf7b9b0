"""Where the compiled programs of tests are kept between runs."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

MAX_BYTES = 4 << 30


def program_cache() -> Path:
    """Returns the folder of compiled programs, one a version of JAX and a kind of processor."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    # XLA compiles for the instructions of this processor; others cannot run what it leaves.
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    kind = hashlib.sha256("".join(features).encode()).hexdigest()[:8]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = importlib.metadata.version("jax")
    return root / "twotower-tests" / f"jax-{version}-{platform.machine()}-{kind}"
