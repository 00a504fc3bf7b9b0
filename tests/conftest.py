"""One strict set-up for every test: shapes checked, rank promotion refused, eight CPU devices."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what tests do. The passes that decide what a program holds and moves run all
# the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Shared by the workers of this run and the processes that tests start, which compile many
    # programs alike.
    programs = tempfile.mkdtemp(prefix="twotower-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import jax
import pytest
from jaxtyping import install_import_hook

import tests.typechecking  # noqa: F401  the hook finds it by name

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("twotower", "tests.typechecking.checked")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data, or a skip that says how to have it."""
    folder = os.environ.get("TWOTOWER_DATA")
    if not folder:
        pytest.skip("TWOTOWER_DATA is not set: no real data to test on")
    from pathlib import Path

    return Path(folder).resolve()


@pytest.fixture
def bigquery_server(monkeypatch):
    """What a server in this process holds, which the library's BigQuery clients ask in this
    test."""
    from tests.bigquery_server import serving

    with serving() as (state, address):
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", address)
        yield state
