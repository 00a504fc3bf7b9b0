"""The console command `twotower`, also `python -m twotower`: one of the commands by its name."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from twotower import __version__
from twotower.core.errors import did_you_mean

# Name -> module within `twotower.commands`, in the order in which a project meets them.
COMMANDS = {
    "inspect": "inspect",
    "plan": "pods.plan",
    "prepare": "pods.prepare",
    "train": "train",
    "export": "export",
    "evaluate": "evaluation.evaluate",
    "query": "query",
    "serve": "serve",
    "impressions": "serving.impressions",
    "recommend_all": "recommend_all",
    "embed": "embed",
    "repeat": "evaluation.repeat",
    "sweep": "evaluation.sweep",
    "compare": "evaluation.compare",
    "grow": "grow",
    "history": "history",
    "publish": "publish",
    "track": "track",
    "options": "options",
}


def main() -> None:
    """Runs the command that the first argument names, with the flags after it."""
    try:
        _run()
    # While modules are imported; commands themselves say more.
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> None:
    # Here, so that Ctrl-C in the midst of these imports ends as quietly as later on.
    from twotower.commands import launch

    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(format_commands())
        return
    if name == "--version":
        print(f"twotower {__version__}")
        return
    # Names in Python have no hyphen; in a shell either is usual.
    command = name.replace("-", "_")
    if command not in COMMANDS:
        sys.exit(
            f"Error: {name!r} is no command{did_you_mean(command, COMMANDS)} Commands: "
            f"{', '.join(COMMANDS)}."
        )
    # As if it were a program of its own: absl and config_flags read the command line themselves.
    sys.argv = [f"twotower {command}", *flags]
    launch.run(_module(command))


def _module(command: str) -> Any:
    return importlib.import_module(f"twotower.commands.{COMMANDS[command]}")


def format_commands() -> str:
    """Returns the usage, with a line on each command."""
    width = max(len(name) for name in COMMANDS)
    lines = []
    for name in COMMANDS:
        # The first line of each module's docstring: the same words as in its --help.
        summary = (_module(name).__doc__ or "").split("\n")[0]
        lines.append(f"  {name:{width}}  {summary}")
    return "\n".join(
        [
            "Usage: twotower COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            "twotower COMMAND --help describes a command and lists its flags.",
        ]
    )


if __name__ == "__main__":
    main()
