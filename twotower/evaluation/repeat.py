"""The command that repeats an evaluation, with every option that was given to it."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from twotower.core.install import command

# Flags of options that the command names otherwise; one of several values has a flag for each.
FLAGS = {
    "ks": ("k",),
    "max_queries": ("queries",),
    "sanity_columns": ("sanity_title", "sanity_category"),
    # Whether the figures go to MLflow too: not what they are.
    "log": (),
}


def given_options(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a call that differ from their defaults, by the names of the flags.

    They are read from the signature, so that an option that is added later is not forgotten.

    Args:
        function: What is called.
        values: The arguments of the call by name, all of them.

    >>> def measure(run, *, ks=(), max_queries=0, slices=()): ...
    >>> given_options(measure, {"run": 1, "ks": (5, 10), "max_queries": 0, "slices": ["country"]})
    {'k': [5, 10], 'slices': ['country']}
    """
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        # What is measured has no default, and is no option.
        if parameter.default is inspect.Parameter.empty:
            continue
        flags = FLAGS.get(name, (name,))
        if len(flags) == 1:
            pairs = [(flags[0], values[name], parameter.default)]
        elif flags:
            pairs = list(zip(flags, values[name], parameter.default))
        else:
            continue
        for flag, value, default in pairs:
            # As JSON will give it back: a list is no tuple.
            if isinstance(value, (list, tuple)):
                value, default = list(value), list(default)
            if value != default:
                given[flag] = value
    return given


def evaluate_command(
    measured: Mapping[str, Any],
    config: Mapping[str, Any],
    workdir: str,
    further: Mapping[str, Any] | None = None,
) -> str:
    """Returns the command that repeats an evaluation, as somebody would write it.

    Args:
        measured: Figures, as `twotower.evaluation.measure.measure_run` returns them, with the
            "options" that `twotower.api.evaluate` adds.
        config: Configuration that was measured.
        workdir: Folder of the run.
        further: Flags of the report.
    """
    protocol = measured["protocol"]
    options: dict[str, Any] = {"workdir": workdir}
    # By number: the best checkpoint is another one when the training has gone on.
    options["checkpoint"] = str(protocol["step"])
    # Figures of earlier versions have no options, and tell some of them themselves.
    lengths = (name.partition("@")[2] for name in measured["model"] if name.startswith("recall@"))
    options["k"] = sorted(map(int, lengths))
    if protocol["split"] != "test":
        options["split"] = protocol["split"]
    if "test_set" in measured:
        options["test"] = measured["test_set"]["source"]
        options["test_name"] = measured["test_set"]["name"]
    if "targets" in protocol:
        options["targets"] = protocol["targets"]
    if measured.get("baselines"):
        options["baselines"] = True
    if protocol["asked"] < protocol["available"]:
        options["queries"] = protocol["asked"]
    # Of the configuration as it was measured: the flag sets it there.
    dim = config.get("retrieval", {}).get("dim")
    if dim:
        options["dim"] = dim
    options |= measured.get("options", {})
    options |= {"report": True, **(further or {})}
    return command("evaluate", *(_flag(name, value) for name, value in options.items()))


def _flag(name: str, value: Any) -> str:
    """Returns a flag as a shell takes it.

    >>> _flag("slices", ["country", "item.two words"]), _flag("baselines", True)
    ("'--slices=country,item.two words'", '--baselines')
    """
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    return shlex.quote(f"--{name}={value}")
