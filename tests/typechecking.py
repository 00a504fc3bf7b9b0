"""The type checker of the test run: beartype, which takes an int where a float is asked, as Python
does."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Any) -> Any:
    """Returns a function whose arguments are checked, and whose checks are written when it is first
    called with them.

    Most functions never are: each closure of a library function would be given its own, in tests
    too that check nothing, which took a tenth of the time of a worker.
    """
    if not isinstance(function, FunctionType):
        return _beartype(function)
    checks: Callable[..., Any] | None = None

    @functools.wraps(function)
    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checks
        if checks is None:
            checks = _beartype(function)
        return checks(*args, **kwargs)

    return check
