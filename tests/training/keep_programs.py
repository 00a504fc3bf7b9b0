"""Runs a module as a program whose compiled programs are kept for later runs of the tests.

    python -m tests.training.keep_programs -m MODULE [ARGUMENTS]

JAX keeps those of the first of several processes alone, though on a CPU each has programs of its
own, and compiling them is most of what a second process does.
"""

import runpy
import sys
from unittest import mock

from jax._src import compiler

from tests import lowering

WRITE = compiler._cache_write


def keep(*arguments):
    """Writes a program to the cache as the first process would."""
    with mock.patch.object(compiler.distributed.global_state, "process_id", 0):
        WRITE(*arguments)


if __name__ == "__main__":
    compiler._cache_write = keep
    lowering.share_contexts()
    _, _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
