"""Tests of an extra skip where it is not installed, and say which; where TWOTOWER_COMPLETE is set
they fail instead."""

import importlib
import os
import shutil
from types import ModuleType

import pytest


def extra(module: str, name: str, *, apart: bool = False) -> ModuleType:
    """The module, which the extra `name` of setup.py installs; `apart` is one that holds back
    packages of others, so that `.ci/run` tests it in an environment of its own."""
    try:
        return importlib.import_module(module)
    except ImportError:
        message = f"{module} is not installed: EXTRAS={name} bash launch_local.sh test"
        if apart:
            pytest.skip(message, allow_module_level=True)
        _missing(message)


def program(name: str, package: str) -> str:
    """The path of a program, which a package of the system installs."""
    return shutil.which(name) or _missing(f"{name} is not installed: apt-get install {package}")


def _missing(message: str) -> None:
    if os.environ.get("TWOTOWER_COMPLETE"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message, allow_module_level=True)
