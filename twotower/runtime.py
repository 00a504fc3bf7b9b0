"""What a process is set up with before JAX starts: the allocator, and the cache of programs.

Commands and the first verb of `twotower` set both up; `import twotower` alone changes nothing. The
environment variable TWOTOWER_RUNTIME=plain leaves both as they are.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

MAX_CACHE_BYTES = 4 << 30
# Options of glibc's mallopt, by the environment variable that sets the same; see malloc.h.
_MALLOC_OPTIONS = {
    # One arena: the heaps of others are unmapped at each free, and XLA's threads use others.
    "MALLOC_ARENA_MAX": (-8, 1),
    # Buffers of a step come from the heap, and the heap is kept.
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
}


@functools.cache
def prepare_process() -> None:
    """Sets up the process once; see `keep_freed_memory` and `cache_programs`."""
    if os.environ.get("TWOTOWER_RUNTIME") == "plain":
        return
    keep_freed_memory()
    cache_programs()


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that is freed, for the next allocation.

    By default the temporary buffers of every training step go back to the system, which clears
    their pages when they are asked for again: half of a small step's time. The price is that the
    process stays as large as it once was. Other allocators, and options that the environment sets,
    are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for variable, (option, value) in _MALLOC_OPTIONS.items():
        if variable not in os.environ:
            libc.mallopt(option, value)


def cache_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, where later processes find them.

    Nothing is done where the environment names a folder or switches the cache off, or where the
    folder cannot be written to.
    """
    if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & os.environ.keys():
        return
    folder = program_folder()
    try:
        # Programs are run as they are read: no one else may write here.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_oldest(folder, MAX_CACHE_BYTES)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    options = {
        "jax_compilation_cache_dir": str(folder),
        # Small programs too: there are many, and reading one takes a tenth of compiling it.
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    # JAX reads the environment when it is imported, which is not done here for its sake: `query`
    # of a known user needs none of it.
    jax = sys.modules.get("jax")
    for name, value in options.items():
        if jax is None:
            os.environ.setdefault(name.upper(), str(value))
        else:
            jax.config.update(name, value)


def run_programs_in_place() -> None:
    """Makes JAX run programs on processors in the thread that asks for them.

    By default another thread runs them, and the one that asks waits: for the vector of one user,
    which takes some tens of microseconds, that is a fifth more, and on a busy core far more. It
    holds for a process that has not used JAX yet.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def program_folder(name: str = "twotower/programs") -> Path:
    """Returns the folder of compiled programs, one a version of JAX and a kind of processor.

    Args:
        name: Name of a folder in the user's cache.
    """
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    # XLA compiles for the instructions of this processor; others cannot run what it leaves.
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    kind = hashlib.sha256("".join(features).encode()).hexdigest()[:8]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = importlib.metadata.version("jax")
    return root / name / f"jax-{version}-{platform.machine()}-{kind}"


def remove_oldest(folder: Path, max_bytes: int) -> None:
    """Removes the oldest files of a folder until the others are at most half of a size, once they
    are larger than it."""
    files = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
    total = sum(status.st_size for _, status in files)
    if total <= max_bytes:
        return
    for path, status in sorted(files, key=lambda entry: entry[1].st_mtime):
        path.unlink(missing_ok=True)
        total -= status.st_size
        if total <= max_bytes // 2:
            return
