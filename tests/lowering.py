"""Lowers the programs of a process in a few contexts of MLIR.

JAX makes one for each program, which takes 5 ms: a sixth of the time of all tests.
"""

import contextlib
import gc
import importlib
import threading
from unittest import mock

import jax

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
