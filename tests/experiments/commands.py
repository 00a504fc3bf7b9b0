"""Commands as tests give them: in this process, where a start costs nothing, or really launched."""

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast
from unittest import mock

from twotower.__main__ import COMMANDS
from twotower.commands import launch

ROOT = Path(__file__).parents[2]


def launched(command: str, *arguments: str) -> str:
    """Returns the standard output of a command in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert not done.returncode, done.stderr
    return done.stdout


def output_of(command: str, *arguments: str) -> str:
    """Returns the standard output of a command that runs in this process."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        _run(command, arguments)
    return text.getvalue()


def error_of(command: str, *arguments: str) -> str:
    """Returns the line that a command in this process ends with, which must be a user's mistake.

    Any other exception than the one that ends a program would show its traceback, and fails the
    test that asks.
    """
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            _run(command, arguments)
        except SystemExit as ended:
            assert ended.code in (1, os.EX_CONFIG) and "Traceback" not in said.getvalue()
            # Lines of the log may come before it.
            message = re.search(r"^Error: .*", said.getvalue(), re.MULTILINE | re.DOTALL)
            assert message
            return message[0].strip()
    raise AssertionError(f"{command} {' '.join(arguments)} did not fail")


@contextlib.contextmanager
def loaded(command: str, arguments: Sequence[str]) -> Iterator[launch.Command]:
    """The module of a command, imported anew, while its arguments are those of the program."""
    name = f"twotower.commands.{COMMANDS[command]}"
    # Anew: the flags of a command keep their values, and the options of one experiment.
    sys.modules.pop(name, None)
    # config_flags reads sys.argv.
    with mock.patch.object(sys, "argv", [f"twotower {command}", *arguments]):
        yield cast(launch.Command, importlib.import_module(name))


def _run(command: str, arguments: tuple[str, ...]) -> None:
    # Paths of experiments count from the project's folder.
    with loaded(command, arguments) as module, contextlib.chdir(ROOT):
        launch.call(module.main, launch.parse(module, sys.argv))
