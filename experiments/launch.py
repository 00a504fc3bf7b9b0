"""What the launchable experiments share: flags checked, quiet logs, and a user's mistake shown as a
line, not a traceback."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

import twotower

_OURS = str(Path(twotower.__file__).parent)


def run(main: Callable[[], None], *, required: Sequence[str]) -> None:
    """Runs `main` under absl with the `required` flags.

    Mistakes of the user are `ValueError`s and `TrainingError`s of the library that say what to do,
    and what the machine refuses is an `OSError` that names the file; they end the program with
    status 1 and their message. Anything else is a defect and keeps its traceback.
    """
    flags.mark_flags_as_required(list(required))
    absl_logging.get_absl_handler().addFilter(_is_for_the_user)
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    # JAX and Orbax tell dozens of lines about each checkpoint, and Orbax warns when a run is only
    # read.
    others = logging.ERROR if "orbax" in record.pathname else logging.WARNING
    return record.pathname.startswith(_OURS) or record.levelno >= others


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except OSError as error:
        sys.exit(f"Error: {_reason(error)}")
    except (
        AttributeError,
        KeyError,
    ) as error:  # what config_flags raises for an option that is not there
        message = _missing_option(str(error), argv)
        if (
            message is None
        ):  # a mistake in the experiment's own Python: its traceback shows the line
            raise
        sys.exit(f"Error: {message}")


def _missing_option(message: str, argv: list[str]) -> str | None:
    """What to say of the option in `argv` that `message`, of config_flags, complains about."""
    if "has no attribute 'get_config'" in message:
        return "the --config file has no function get_config()."
    quoted, near = re.search(r"'(\w+)", message), re.search(r'Did you mean \\?"(\w+)', message)
    options = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
    for option in options if quoted else ():
        parents, name, _ = option.removeprefix("--").partition(f".{quoted[1]}")
        if name and name[1:] in option.split("."):
            hint = f"; did you mean {near[1]!r}?" if near else "."
            if parents.endswith((".columns", ".user", ".item")):
                hint += f" A mapping is set whole: --{parents}={{...}}."
            return f"{option}: {parents} has no option {quoted[1]!r}{hint}"
    return None


def _reason(error: OSError) -> str:
    if error.filename:
        return f"{error.filename}: {error.strerror}."
    return (
        str(error).strip().splitlines()[-1].strip()
    )  # of config_flags, whose last line has the reason


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
    from twotower.core.errors import TrainingError

    if argv[1:]:
        raise app.UsageError(
            f"Unexpected arguments: {' '.join(argv[1:])}. Options are given as --name=value."
        )
    try:
        main()
    except KeyboardInterrupt:
        print(
            "Interrupted. A training goes on from its last checkpoint when the same command is given again.",
            file=sys.stderr,
        )
        sys.exit(130)
    except OSError as error:
        absl_logging.debug("where it happened", exc_info=True)
        sys.exit(f"Error: {_reason(error)}")
    except (ValueError, TrainingError) as error:
        if not type(error).__module__.startswith("twotower."):
            raise
        sys.exit(f"Error: {error}")
