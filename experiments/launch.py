"""What the launchable experiments share: arguments checked, and a user's mistake shown as one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags


def run(main: Callable[[], None], *, required: Sequence[str]) -> None:
    """Runs `main` under absl with the `required` flags.

    Mistakes of the user are `ValueError`s and `TrainingError`s of the library that say what to do; they end the program with
    status 1 and their message. Anything else is a defect and keeps its traceback.
    """
    flags.mark_flags_as_required(list(required))
    app.run(lambda argv: _guarded(main, argv))


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
    from twotower.training.loop import TrainingError

    if argv[1:]:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}. Options are given as --name=value.")
    try:
        main()
    except (ValueError, TrainingError) as error:
        if not type(error).__module__.startswith("twotower."):
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
