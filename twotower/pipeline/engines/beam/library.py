"""Apache Beam, imported where it is used and without types: its extra holds back packages that
others want newer, so that it is not installed where types are checked."""

from __future__ import annotations

import functools
import importlib
import logging
import shlex
from typing import Any

from twotower.core.install import extra

# What runs a pipeline on this machine. Beam's own default would download a program first.
_LOCAL = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


@functools.cache
def apache_beam() -> Any:
    """Returns the package.

    Raises:
        ConfigError: It is not installed.
    """
    with extra("beam", "--engine=beam"):
        beam = importlib.import_module("apache_beam")
    # It says of each function that the types of its arguments are written as text.
    name = "apache_beam.typehints.native_type_compatibility"
    logging.getLogger(name).setLevel(logging.WARNING)
    return beam


def pipeline_options(text: str) -> Any:
    """Returns the options of a pipeline, which this machine runs where they name no runner.

    Args:
        text: Options as on a command line.
    """
    options = apache_beam().options.pipeline_options
    found = options.PipelineOptions(shlex.split(text))
    standard = found.view_as(options.StandardOptions)
    if standard.runner is None:
        standard.runner = _LOCAL
    return found
