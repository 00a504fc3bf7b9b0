"""One strict set-up for every test: shapes checked, rank promotion refused, eight CPU devices."""

import gc
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from unittest import mock

from twotower.runtime import MAX_CACHE_BYTES, keep_freed_memory, program_folder, remove_oldest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what tests do. The passes that decide what a program holds and moves run all
# the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Half of compiling a step, or more, are loops that MLIR writes; XLA's older emitters need no
    # MLIR. Newer versions do not know the flag: the quick tests with them show the others at work.
    # Workers inherit it; programs are kept by the whole text of the flags.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {flags}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Shared by the workers, by the processes that tests start and by later runs, which compile many
    # programs alike. A program is found by its whole text, so a stale one is never taken.
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(program_folder("twotower-tests")),
        # Small ones too: there are thousands, and compiling them was a fifth of the time.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
import jax
import pytest
from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

import tests.typechecking  # noqa: F401  the hook finds it by name
from tests import lowering

# Tests start a hundred processes, which otherwise compile the package anew each: .7 s of theirs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
keep_freed_memory()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The packages whose signatures carry shapes. Wrapping the others costs each worker seconds.
SHAPED = ("core", "kernels", "towers", "objectives", "training", "index", "evaluation")
# In the first worker alone: shapes are checked whenever a program is traced, which costs an eighth
# of the time of all tests, and each worker runs another part of them in every run.
# They are checked in the tests of these packages; whole runs trace the same functions again.
CHECKED = (*SHAPED, "conformance")
if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
    install_import_hook([f"twotower.{name}" for name in SHAPED], "tests.typechecking.checked")
# Only after the hook, which looks at modules when they are imported.
mesh = importlib.import_module("twotower.core.mesh")
MAKE_MESH = mesh.make_mesh
# Devices of a mesh whose number nobody names; 0 are all.
UNNAMED = {"devices": 1}
# Few cases of many seconds each, spent in other processes or in compiling. They come first: workers
# take whole files, and the last one is run by one worker while the others have ended.
LONGEST = (
    "experiments/test_recipes.py",
    "test_guides.py",
    "training/test_processes.py",
    "training/test_mesh.py",
    "training/test_step.py",
    "training/test_sequence_training.py",
    "integrations/test_live_tracking.py",
    "experiments/test_own_parts.py",
    "experiments/test_configs.py",
    "experiments/test_pipeline.py",
    "experiments/test_sweep.py",
    "integrations/test_mlflow_model.py",
    "serving/test_processes.py",
    "serving/test_fuzz_api.py",
    "training/test_topologies.py",
    "test_wheel.py",
)


def make_mesh(devices: int = 0) -> jax.sharding.Mesh:
    """One device where a test names no number: programs for eight take longer to trace and compile,
    and what eight do is tested where they are named."""
    return MAKE_MESH(devices or UNNAMED["devices"])


mock.patch.object(mesh, "make_mesh", make_mesh).start()
lowering.share_contexts()
# Tracing makes millions of small objects that die at once: a walk for every 700 of them is a
# twentieth of the time.
gc.set_threshold(20_000, 20, 50)


def pytest_configure(config: pytest.Config) -> None:
    """Shortens a cache of programs that has grown too large, before any worker begins."""
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if not hasattr(config, "workerinput") and folder.is_dir():
        remove_oldest(folder, MAX_CACHE_BYTES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files by LONGEST, and the others as they are."""
    tests = Path(__file__).parent
    order = {str(tests / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


def pytest_collection_finish() -> None:
    """Takes what is there before the first test out of the garbage collector's walks: modules and
    cases, which live to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Checks shapes in the tests of the packages whose signatures carry them."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    shape_checks.update("jaxtyping_disable", folder not in CHECKED)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets the programs of many files go."""
    if nextitem is None or nextitem.path != item.path:
        lowering.forget_programs()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def all_devices(monkeypatch):
    """A mesh has all devices where no number is named, as outside the tests."""
    monkeypatch.setitem(UNNAMED, "devices", 0)


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


@pytest.fixture
def own_kinds():
    """Takes the kinds that a test registers out again: other tests list those of the library."""
    from twotower.core.kinds import REGISTRIES

    yield
    for kinds in REGISTRIES:
        for name in list(kinds.origins):
            del kinds[name]
