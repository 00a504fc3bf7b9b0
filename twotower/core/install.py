"""Where the package runs from, a checkout or an installed wheel, and how commands are given there.

Messages name a command as it can be copied into the shell that the user has in front of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from twotower.core.errors import ConfigError

_PACKAGE = Path(__file__).parent.parent


def checkout() -> Path | None:
    """Returns the folder of the project that the package runs from; None for an installed wheel."""
    root = _PACKAGE.parent
    # A wheel has no experiments beside the package: its configurations lie within.
    if (root / "experiments").is_dir() and (root / "setup.py").is_file():
        return root
    return None


def command(name: str, *flags: str) -> str:
    """Returns a command line.

    In the folder of a checkout it needs no installation; anywhere else it is the console command.

    Args:
        name: Name of the command, such as "train".
        *flags: Flags that follow it.

    >>> command("export", "--workdir=runs/mine").split(".")[-1].split("twotower ")[-1]
    'export --workdir=runs/mine'
    """
    start = f"twotower {name}"
    root = checkout()
    if root is not None and _is_in_checkout():
        start = f"python -m experiments.{name}"
        # A file inspect.py would hide Python's own module from the scripts beside it.
        if not (root / "experiments" / f"{name}.py").is_file():
            start = f"python -m twotower {name}"
    return " ".join([start, *flags])


def install_line(extra: str) -> str:
    """Returns the command that installs an extra of setup.py beside the package.

    Args:
        extra: Name of the extra, such as "mlflow".
    """
    root = checkout()
    if root is None:
        return f"pip install 'twotower[{extra}]'"
    # From another folder, "." would be another project.
    folder = "." if _is_in_checkout() else root
    return f"pip install -e '{folder}[{extra}]'"


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Turns a failed import into a `ConfigError` that names the extra to install.

    Args:
        name: Name of the extra, a key of `extras_require` in setup.py.
        what: Name of the feature that needs it, the subject of the message.
    """
    try:
        yield
    # The original message is kept: a part of an extra may be installed and broken.
    except ImportError as error:
        raise ConfigError(
            f"{what} needs the extra {name!r} ({error}): {install_line(name)}."
        ) from error


def shipped_folder() -> Path:
    """Returns the folder that holds the shipped `configs`, `features` and `examples`."""
    root = checkout()
    if root is None:
        # Copied here from `experiments` when the wheel is built.
        return _PACKAGE / "shipped"
    return root / "experiments"


def _is_in_checkout() -> bool:
    return checkout() == Path.cwd()
