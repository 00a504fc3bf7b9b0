"""Lowers the programs of a process in a few contexts of MLIR.

JAX makes one for each program, which takes 5 ms: a sixth of the time of all tests.
"""

import contextlib
import importlib
import threading
from unittest import mock

# A context keeps the constants of its programs, so that one for all would only grow.
PROGRAMS = 100


def share_contexts():
    """Makes one context for so many programs; a JAX without the function that makes them goes on as
    it is."""
    with contextlib.suppress(ImportError, AttributeError):
        mlir = importlib.import_module("jax._src.interpreters.mlir")
        mock.patch.object(mlir, "make_ir_context", _shared(mlir.make_ir_context)).start()


def _shared(make):
    lock = threading.Lock()
    context = None
    lowered = 0

    def shared():
        nonlocal context, lowered
        with lock:
            if lowered % PROGRAMS == 0:
                context = make()
            lowered += 1
            return context

    return shared
