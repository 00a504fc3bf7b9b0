"""Disks that fill, and processes that are killed, at the n-th write: in this process, so that every
write can be tried."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

WRITES = (
    (np, "save"),
    (np, "savez"),
    (pq, "write_table"),
    (Path, "write_text"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
    (Path, "touch"),
    (os, "replace"),
    (os, "fsync"),
)
DELETIONS = ((Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree"))


class Killed(BaseException):
    """What stands for the end of the process: nothing is written or deleted after it."""


class Faults:
    """Counts writes, and lets those from the n-th on fail.

    Args:
        number: Number of the first write that fails, from 1.
        is_kill: Whether the process ends there; else the disk is full, and deletions still work.
    """

    def __init__(self, number, *, is_kill):
        self.number = number
        self.is_kill = is_kill
        self.writes = 0

    def _failing(self, function, is_deletion):
        def call(*args, **options):
            self.writes += not is_deletion
            if self.writes >= self.number and self.is_kill:
                raise Killed
            if self.writes >= self.number and not is_deletion:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **options)

        return call

    @property
    def has_struck(self):
        return self.writes >= self.number

    @contextlib.contextmanager
    def installed(self, monkeypatch):
        with monkeypatch.context() as patch:
            for functions, is_deletion in ((WRITES, False), (DELETIONS, True)):
                for owner, name in functions:
                    patch.setattr(owner, name, self._failing(getattr(owner, name), is_deletion))
            yield


def sweep(make, work, check, monkeypatch, *, is_kill, every):
    """Fails at one write after another, each time on what is made anew.

    Args:
        make: Function that makes what is worked on.
        work: Function of that, which writes.
        check: Function of that and the error, called after each failure.
        is_kill: Whether the process ends at the write; else the disk is full.
        every: Whether each write is tried; else one in the middle and the last ones, which switch
            from the old to the new.

    Returns:
        The number of writes.
    """
    counted = Faults(10**9, is_kill=False)
    made = make()
    with counted.installed(monkeypatch):
        work(made)
    last = counted.writes
    numbers = range(1, last + 1) if every else (last // 2, last - 1, last)
    for number in numbers:
        made = make()
        faults = Faults(number, is_kill=is_kill)
        error = None
        try:
            with faults.installed(monkeypatch):
                work(made)
        except (Killed, Exception) as caught:
            error = caught
        assert faults.has_struck
        check(made, error)
    return last
