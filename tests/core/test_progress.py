"""Progress shows nothing of short work, and passes every block on."""

import pytest
from absl import logging

from twotower.core import progress as module
from twotower.core.progress import progress


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("total", [0, 1, 3])
def test_every_block_is_passed_on(total, terminal, monkeypatch):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(progress(range(total), total=total, what="Work")) == list(range(total))


@pytest.mark.parametrize("total, lines", [(1, 0), (3, 3)])
def test_a_single_block_is_no_progress(total, lines, monkeypatch):
    logged = []
    monkeypatch.setattr(logging, "info", lambda *words: logged.append(words))
    list(progress(range(total), total=total, what="Work", seconds=-1.0))
    assert len(logged) == lines


@pytest.mark.parametrize("kernel", [False, True])
def test_a_notebook_is_a_screen_and_a_shell_without_a_terminal_is_none(kernel, monkeypatch):
    """As ipykernel says it of itself; its standard error is no terminal."""

    class Shell:
        config = {"IPKernelApp": {}} if kernel else {}

    class IPython:
        get_ipython = staticmethod(Shell)

    monkeypatch.setitem(module.sys.modules, "IPython", IPython)
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False, raising=False)
    assert module.has_screen() is kernel
