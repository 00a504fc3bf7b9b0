"""Errors name what is wrong and the nearest right name, and have one base."""

import inspect
import re

import pytest

from twotower.core import errors
from twotower.core.errors import ConfigError, TwotowerError, choose
from twotower.core.install import extra, install_line


def test_choose_gives_the_kind_or_names_the_nearest():
    kinds = {"softmax": 1, "bpr": 2}
    assert choose(kinds, "bpr", "config.objective.loss") == 2
    with pytest.raises(
        ConfigError,
        match="config.objective.loss='sofmax' is not known; did you mean 'softmax'.*bpr, softmax",
    ):
        choose(kinds, "sofmax", "config.objective.loss")
    with pytest.raises(ConfigError) as error:
        choose(kinds, "xyz", "loss")
    assert "did you mean" not in str(error.value)


def test_every_exception_is_one_of_the_package_and_one_of_python():
    for cls in vars(errors).values():
        if inspect.isclass(cls) and issubclass(cls, Exception) and cls is not TwotowerError:
            assert issubclass(cls, TwotowerError)
            assert issubclass(cls, (ValueError, RuntimeError, SystemExit))


def test_a_missing_library_is_told_with_the_extra_that_brings_it():
    message = rf"Tracking needs the extra 'x' \(no module\): {re.escape(install_line('x'))}"
    with pytest.raises(ConfigError, match=message), extra("x", "Tracking"):
        raise ImportError("no module")
