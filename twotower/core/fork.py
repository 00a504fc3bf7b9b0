"""The refusal to use JAX in a process that was forked from one that had used it."""

from __future__ import annotations

import os

from twotower.core.errors import ForkError


class _Fork:
    """How far this process has come with JAX.

    Attributes:
        is_used: Whether devices were asked for, so that JAX has threads.
        is_left_behind: Whether these threads are those of a parent.
    """

    is_used = False
    is_left_behind = False


def _note_fork() -> None:
    _Fork.is_left_behind = _Fork.is_used


os.register_at_fork(after_in_child=_note_fork)


def check_fork() -> None:
    """Refuses to use JAX in a process that was forked from one that had used it.

    A fork copies no threads: the child would wait for those of JAX for ever.

    Raises:
        ForkError: This is such a process.
    """
    if _Fork.is_left_behind:
        raise ForkError(
            "This process was forked from one that had loaded a model, so that neither JAX nor "
            "changes of a bundle work in it. Start workers by "
            "multiprocessing.get_context('spawn'), or load the retriever in each of them and not "
            "before (gunicorn: without --preload)."
        )
    _Fork.is_used = True
