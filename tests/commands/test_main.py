"""The console command: its list of commands, their help, and names that are nearly right."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import twotower
from tests.experiments.commands import error_of
from twotower import __main__, commands

ROOT = Path(__file__).parents[2]


def ended(monkeypatch, *arguments):
    """Returns what the console command ends with."""
    monkeypatch.setattr("sys.argv", ["twotower", *arguments])
    # Anew: the flags of a command keep their values.
    for name in __main__.COMMANDS.keys() & arguments:
        sys.modules.pop(f"twotower.commands.{__main__.COMMANDS[name]}", None)
    try:
        __main__.main()
    except SystemExit as end:
        return end.code
    return 0


def test_every_command_is_listed_and_has_a_launch():
    prefix = "twotower.commands."
    names = [module.name for module in pkgutil.walk_packages(commands.__path__, prefix)]
    with_flags = {name for name in names if hasattr(importlib.import_module(name), "FLAGS")}
    assert with_flags == {prefix + module for module in __main__.COMMANDS.values()}
    usage = __main__.format_commands()
    for name in __main__.COMMANDS:
        assert f"\n  {name} " in usage
        # A script experiments/inspect.py would hide Python's own module from those beside it.
        if name == "inspect":
            continue
        launch = (ROOT / "experiments" / f"{name}.py").read_text(encoding="utf-8")
        assert f"launch.run({name})" in launch


@pytest.mark.parametrize(
    "arguments, printed",
    [
        ((), "twotower COMMAND --help"),
        (("--version",), twotower.__version__),
        (("recommend-all", "--help"), "--recall_target (default: 1.0)"),
        (("train", "--help"), "`twotower options` lists"),
    ],
)
def test_help_is_printed(monkeypatch, capsys, arguments, printed):
    assert ended(monkeypatch, *arguments) == 0
    assert printed in " ".join(capsys.readouterr().out.split())


# Registered first, so that it is called last.
ENDED = """
import atexit, gc
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000))
from twotower import __main__
__main__.main()
"""


def test_a_command_ends_without_a_walk_over_its_objects():
    arguments = [sys.executable, "-c", ENDED, "options", "--help"]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.endswith("False True\n")


def test_help_names_commands_as_they_are_given_here(monkeypatch, capsys, tmp_path):
    for folder, command in ((ROOT, "python -m experiments.train"), (tmp_path, "twotower train")):
        monkeypatch.chdir(folder)
        ended(monkeypatch, "train", "--help")
        assert f"\n    {command} --config=quickstart" in capsys.readouterr().out


def test_a_command_that_is_not_there_gets_the_nearest(monkeypatch):
    assert "'trian' is no command; did you mean 'train'?" in ended(monkeypatch, "trian")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=quickstart"], "--workdir=... is required."),
        (["--config=quickstart", "--workdri=x"], "Did you mean: workdir"),
        (["--config=quickstart", "--workdir=x", "y"], "unexpected arguments: y."),
        (["--config=quickstart", "--workdir=x", "--config.training.steps=abc"], "'abc'"),
        (["--config=quikstart", "--workdir=x"], "did you mean 'quickstart'?"),
    ],
)
def test_a_mistake_in_the_flags_is_a_line(flags, message):
    assert message in error_of("train", *flags)
