"""Lowers the programs of a process in a few contexts of MLIR, and those that are exported once for
all runs.

JAX makes a context for each program, which takes 5 ms: a sixth of the time of all tests.
"""

import contextlib
import gc
import hashlib
import importlib
import os
import re
import threading
from pathlib import Path
from unittest import mock

import jax
import jax.export
import numpy as np

from twotower.core.files import atomic

# A context keeps the constants of its programs, so that one for all would only grow.
PROGRAMS = 100
# Every program holds parts of the map of memory, of which the system gives a process 65,530; the
# next one ends it.
KEPT = 1000
lowered = 0
forgotten = 0


def share_contexts():
    """Makes one context for so many programs; a JAX without the function that makes them goes on as
    it is."""
    with contextlib.suppress(ImportError, AttributeError):
        mlir = importlib.import_module("jax._src.interpreters.mlir")
        mock.patch.object(mlir, "make_ir_context", _shared(mlir.make_ir_context)).start()


def forget_programs():
    """Lets compiled programs go where there are many."""
    global forgotten
    if lowered - forgotten > KEPT:
        forgotten = lowered
        jax.clear_caches()
        gc.collect()


def keep_exports():
    """Keeps exported programs beside the compiled ones, which they are for several platforms, and
    found likewise: by the whole text of what was traced.

    Lowering the towers of a bundle for four platforms takes five times as long as tracing them.
    """
    mock.patch.object(jax.export, "export", _kept(jax.export.export)).start()


def _kept(export):
    def kept(function, *, platforms=None, **options):
        def exported(*arguments):
            traced = function.trace(*arguments)
            path = _export_path(traced, [platforms, options, jax.__version__])
            if path.exists():
                return jax.export.deserialize(bytearray(path.read_bytes()))
            made = export(function, platforms=platforms, **options)(*arguments)
            with atomic(path) as file:
                file.write_bytes(made.serialize())
            return made

        return exported

    return kept


def _export_path(traced, others):
    # The text of a program leaves its constants out.
    constants = [[x.dtype.str, x.shape, x.tobytes()] for x in map(np.asarray, traced.jaxpr.consts)]
    # Functions that only a gradient would need are told by where they lie in memory.
    program = re.sub("0x[0-9a-f]+", "", str(traced.jaxpr))
    trees = str([traced.in_tree, traced.out_info])
    text = repr([program, constants, trees, others])
    name = f"export-{hashlib.sha256(text.encode()).hexdigest()}"
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / name


def _shared(make):
    lock = threading.Lock()
    context = None

    def shared():
        global lowered
        nonlocal context
        with lock:
            if lowered % PROGRAMS == 0:
                context = make()
            lowered += 1
            return context

    return shared
