"""What the launchable experiments share: flags checked, quiet logs, and a user's mistake shown as a line, not a traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

import twotower

_OURS = str(Path(twotower.__file__).parent)


def run(main: Callable[[], None], *, required: Sequence[str]) -> None:
    """Runs `main` under absl with the `required` flags.

    Mistakes of the user are `ValueError`s and `TrainingError`s of the library that say what to do; they end the program with
    status 1 and their message. Anything else is a defect and keeps its traceback.
    """
    flags.mark_flags_as_required(list(required))
    # Orbax and JAX tell dozens of lines about each checkpoint; their warnings are enough.
    absl_logging.get_absl_handler().addFilter(lambda r: r.levelno >= logging.WARNING or r.pathname.startswith(_OURS))
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, OSError) as error:  # what config_flags raises for an option or a file that is not there
        message = str(error).replace("\\n", " ").replace("\\", "").strip("\"'")
        sys.exit(f"Error: --config: there is no option '{message}." if not isinstance(error, OSError) else f"Error: {error}")


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
    from twotower.training.loop import TrainingError

    if argv[1:]:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}. Options are given as --name=value.")
    try:
        main()
    except (ValueError, TrainingError) as error:
        if not type(error).__module__.startswith("twotower."):
            raise
        sys.exit(f"Error: {error}")
