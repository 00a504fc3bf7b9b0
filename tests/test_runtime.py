"""What a process is set up with: the allocator and the cache of programs."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from twotower import runtime
from twotower.core.arrow import release_freed_memory

# One allocation of 64 MiB that is freed and made again in a thread of its own: its pages are asked
# for again if the allocator gave them back.
FAULTS = """
import ctypes, resource, threading
from twotower import runtime
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
runtime.prepare_process()
def touch():
    for turn in range(4):
        buffers = [libc.malloc(2**21) for _ in range(16)]
        for buffer in buffers:
            ctypes.memset(buffer, 1, 2**21)
        for buffer in buffers:
            libc.free(buffer)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
faults = []
thread = threading.Thread(target=touch)
thread.start()
thread.join()
print(faults[-1] - faults[0])
"""


def page_faults(**environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
@pytest.mark.slow
def test_freed_memory_is_not_fetched_again_from_the_system():
    # Three more turns of 32 MiB are 24,576 pages.
    assert page_faults() < 1_000
    assert page_faults(TWOTOWER_RUNTIME="plain") > 20_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the call")
def test_memory_that_is_released_is_no_longer_resident():
    buffers = [np.ones(2**18) for _ in range(32)]
    # Between the buffers, so that their end is not that of the heap.
    kept = [buffers.pop(), np.ones(2**18)]
    buffers.clear()
    before = anonymous_bytes()
    release_freed_memory()
    assert anonymous_bytes() < before - 48 * 2**20
    assert all((buffer == 1).all() for buffer in kept)


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


def test_the_cache_of_programs_is_the_users_own_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "jax", None)
    # What the call sets is taken back with the test.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    runtime.cache_programs()
    folder = runtime.program_folder()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert folder.is_relative_to(tmp_path) and folder.stat().st_mode & 0o777 == 0o700

    for number in range(4):
        (folder / f"program-{number}").write_bytes(bytes(100))
        os.utime(folder / f"program-{number}", (number, number))
    runtime.remove_oldest(folder, 400)
    assert len(list(folder.iterdir())) == 4
    runtime.remove_oldest(folder, 399)
    assert sorted(path.name for path in folder.iterdir()) == ["program-3"]


@pytest.mark.parametrize("variable", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_a_cache_that_the_environment_names_is_left(monkeypatch, tmp_path, variable):
    environment = {"HOME": str(tmp_path), variable: "mine"}
    monkeypatch.setattr(os, "environ", dict(environment))
    runtime.cache_programs()
    assert os.environ == environment and not list(tmp_path.iterdir())
