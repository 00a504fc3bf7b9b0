"""The launch of every command: quiet logs, and a user's mistake shown as a line, not as a
traceback.

Commands import the library in their `main`: `--help` and a wrong flag need not wait for JAX.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app
from absl import logging as absl_logging

import twotower

_PACKAGE = str(Path(twotower.__file__).parent)  # loads no module of the package
INTERRUPTED = 130  # exit status, as a shell gives it for Ctrl-C


def run(main: Callable[[], None]) -> None:
    """Runs `main` under absl with the flags of the command line.

    Mistakes of the user are `ValueError`s and `TrainingError`s of the library that say what to do,
    and refusals of the machine are `OSError`s that name the file; they end the program with status
    1 and their message. Anything else is a defect and keeps its traceback.
    """
    absl_logging.get_absl_handler().addFilter(_is_for_the_user)
    app.run(lambda argv: call(main, argv), flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake in them ends the program with a line.

    Returns:
        The name of the program, and arguments that are no flags.
    """
    try:
        return app.parse_flags_with_usage(argv)
    except OSError as error:
        sys.exit(f"Error: {_reason(error)}")
    except (AttributeError, KeyError) as error:
        # config_flags raises these for an option that is not there.
        message = _explain_missing_option(str(error), argv)
        if message is None:
            # A mistake in the experiment's own Python: its traceback shows the line.
            raise
        sys.exit(f"Error: {message}")


def call(main: Callable[[], None], argv: list[str]) -> None:
    """Calls `main`; a mistake ends the program with a line.

    Args:
        main: Command, whose flags have been parsed.
        argv: Result of `parse`.
    """
    from twotower.core.errors import TrainingError

    # Such as a value that a space parts from its flag by mistake: absl would ignore it.
    if argv[1:]:
        raise app.UsageError(
            f"Unexpected arguments: {' '.join(argv[1:])}. Options are given as --name=value."
        )
    try:
        main()
    except KeyboardInterrupt:
        print(
            "Interrupted. A training goes on from its last checkpoint when the same command is "
            "given again.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
    except OSError as error:
        # A full disk or a missing file is no defect: its traceback is for --verbosity=1 alone.
        absl_logging.debug("where it happened", exc_info=True)
        sys.exit(f"Error: {_reason(error)}")
    except (ValueError, TrainingError) as error:
        # A ValueError of another library is a defect of ours: nothing in it says what to do.
        if not type(error).__module__.startswith("twotower."):
            raise
        sys.exit(f"Error: {error}")


def _is_for_the_user(record: logging.LogRecord) -> bool:
    # JAX and Orbax log dozens of lines about each checkpoint, and Orbax warns when a run is only
    # read.
    lowest = logging.ERROR if "orbax" in record.pathname else logging.WARNING
    is_ours = record.pathname.startswith((_PACKAGE, __file__))
    return is_ours or record.levelno >= lowest


def _explain_missing_option(message: str, argv: list[str]) -> str | None:
    """Returns a message on the option in `argv` that config_flags does not know, if it is one.

    Args:
        message: Text of the exception of config_flags.
        argv: Command line.
    """
    if "has no attribute 'get_config'" in message:
        return "the --config file has no function get_config()."
    unknown = re.search(r"'(\w+)", message)
    if unknown is None:
        return None
    nearest = re.search(r'Did you mean \\?"(\w+)', message)
    options = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
    for option in options:
        parents, name, _ = option.removeprefix("--").partition(f".{unknown[1]}")
        # A whole part of the path, not the beginning of a longer one.
        if not name or name[1:] not in option.split("."):
            continue
        hint = "."
        if nearest:
            hint = f"; did you mean {nearest[1]!r}?"
        # Mappings with keys of the user's own have no options to set one by one.
        if parents.endswith((".columns", ".user", ".item")):
            hint += f" A mapping is set whole: --{parents}={{...}}."
        return f"{option}: {parents} has no option {unknown[1]!r}{hint}"
    return None


def _reason(error: OSError) -> str:
    if error.filename:
        return f"{error.filename}: {error.strerror}."
    # That of config_flags has the reason in its last line.
    return str(error).strip().splitlines()[-1].strip()
