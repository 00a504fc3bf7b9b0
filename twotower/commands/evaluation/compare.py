r"""Compares evaluated runs, query by query: best, not to be told apart, differences, slices.

    twotower compare runs/a runs/b runs/b:ease [--split=validation] [--json=compared.json]
        [--report=compared.html]

Each run is a folder that `evaluate` measured, or that of `repeat`, whose seeds are averaged;
RUN:NAME is a baseline that was measured beside it (--baselines). All must have been measured alike.
With --mlflow_experiment=shop runs are named as in that experiment of MLflow: compare a b b:ease.

    twotower compare --gate=runs/live runs/new [--thresholds=limits.json]

judges whether runs/new may take the place of runs/live. Exit status 0: it passes; 1: it fails, as
the whole interval of a difference lies below -tolerance; 2: undecided, or the gate refuses to
judge, since models of known worth came through it: shuffled scores, a collapsed model, a tenth of
the training. limits.json: {"recall@10": {"tolerance": 0.005}, "slices": {"users=cold":
{"recall@10": {"share": 0.1}}}}; by default a twentieth of recall and NDCG. A mistake ends with 78.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from twotower.commands import mlflow_flags

FLAGS = flags.FlagValues()
POSITIONAL = "runs"  # the flag that an argument without a name sets
_RUNS = flags.DEFINE_multi_string(
    "runs", [], "Runs to compare, the first with each of the others.", flag_values=FLAGS
)
_EXPERIMENT = mlflow_flags.define_experiment(FLAGS)
_SPLIT = flags.DEFINE_string(
    "split",
    "test",
    "The rows that were found: test, validation, or the name of a further test set.",
    flag_values=FLAGS,
)
_GATE = flags.DEFINE_string(
    "gate",
    None,
    "Run that stands: judge whether the one given may take its place.",
    flag_values=FLAGS,
)
_THRESHOLDS = flags.DEFINE_string(
    "thresholds", None, "JSON file of the losses that --gate puts up with.", flag_values=FLAGS
)
_UNDERTRAINED = flags.DEFINE_string(
    "undertrained",
    None,
    "Run of a tenth of the training, which --gate must fail; by default one is made up of the "
    "validations of the run that stands.",
    flag_values=FLAGS,
)
_JSON = flags.DEFINE_string("json", None, "File to write all figures to.", flag_values=FLAGS)
_REPORT = flags.DEFINE_string(
    "report", None, "File to write a page to look at to; needs the extra plots.", flag_values=FLAGS
)


def main() -> None:
    from twotower import api
    from twotower.core.errors import ConfigError

    # Else they would be read past, and the comparison be taken for a judgement by them.
    for flag in (_THRESHOLDS, _UNDERTRAINED):
        if flag.value and not _GATE.value:
            raise ConfigError(f"--{flag.name} is a part of --gate=RUN: give that too.")
    if _GATE.value and _REPORT.value:
        raise ConfigError(f"--report={_REPORT.value} is of a comparison: leave out --gate.")
    if not _GATE.value:
        runs = [_EXPERIMENT.named(run) for run in _RUNS.value]
        comparison = api.compare(runs, split=_SPLIT.value, report=_REPORT.value)
        _write(comparison.to_dict())
        return
    try:
        sys.exit(_judge(_GATE.value))
    # The status 1 of a gate means that the candidate fails, and nothing else.
    except OSError as error:
        raise ConfigError(str(error)) from error


def _judge(standing: str) -> int:
    """Judges by the flags, and returns the exit status."""
    from twotower import api
    from twotower.core.errors import ConfigError

    if len(_RUNS.value) != 1:
        given = " ".join(_RUNS.value) or "none"
        raise ConfigError(f"--gate={standing} judges one run; given: {given}.")
    undertrained = _UNDERTRAINED.value
    if undertrained is not None:
        undertrained = _EXPERIMENT.named(undertrained)
    judgement = api.judge(
        _EXPERIMENT.named(standing),
        _EXPERIMENT.named(_RUNS.value[0]),
        thresholds=_THRESHOLDS.value,
        undertrained=undertrained,
        split=_SPLIT.value,
    )
    # Before the exit: a pipeline reads why a candidate has failed.
    _write(dataclasses.asdict(judgement))
    return judgement.exit_code


def _write(content: Mapping[str, Any]) -> None:
    from twotower.core.files import atomic

    if not _JSON.value:
        return
    with atomic(Path(_JSON.value)) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nWritten to {_JSON.value}.")
