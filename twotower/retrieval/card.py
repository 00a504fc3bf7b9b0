"""The model card of a bundle, README.md: its data, what was measured, what it is for, its limits.

It says what the manifest holds, in words, and nothing that differs from one export to the next.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from twotower.core.tables import format_table

CARD = "README.md"
INTERVAL = "95% interval"  # at the level of evaluation, which this module may not read
METRICS = ("recall@", "ndcg@", "mrr@")  # figures that a card shows, of all that were measured


def format_card(manifest: Mapping[str, Any]) -> str:
    """Returns the card of a bundle.

    Args:
        manifest: Entries of the bundle's manifest, but for the hashes of its files.
    """
    sections = [
        "# Model card",
        f"{_kind(manifest)}: {manifest['num_items']:,} items, {manifest['num_users']:,} known "
        f"users, vectors {manifest['dim']} wide.",
        "## Data",
        "\n".join(_data_lines(manifest.get("data", {}))),
        "## Measured",
        _measured(manifest.get("figures", {}), manifest.get("intervals", {})),
        manifest.get("tuned", ""),
        "## Intended use",
        f"Lists of items that a user may want next, from the corpus above. {_scores(manifest)}",
        "## Limits",
        "Users and items that training never saw are known by their features alone. What was "
        "popular in the log is recommended more often. Figures hold for the held-out rows of this "
        "log, and not for what showing the lists would change.",
        "## Personal data",
        _personal(manifest.get("personal", {})),
        "## Commands",
        _commands(manifest),
        "## Use",
        "```python\nimport twotower as tt\n\n"
        'tt.Retriever.load("bundle").recommend("USER", k=10)\n```',
    ]
    # Empty ones are left out: most runs were not tuned.
    return "\n\n".join(filter(None, sections)) + "\n"


def _kind(manifest: Mapping[str, Any]) -> str:
    """Returns the model in words: trained towers, or a baseline in their form."""
    version = manifest["model_version"][:12]
    # A baseline in the form of towers must not pass for a trained model.
    baseline = manifest.get("baseline")
    if not baseline:
        return f"Two-tower retrieval model {version} of step {manifest['step']}"
    form = "as it is" if baseline["exact"] else "approximated by its vectors"
    return f"The baseline {baseline['name']} ({baseline['setting']}), {form}, {version}"


def _scores(manifest: Mapping[str, Any]) -> str:
    """Returns what the scores of the bundle mean."""
    # Whoever reads a score of 0.9 takes it for one.
    if manifest.get("probability"):
        return "The model was trained on labels, and scores of pairs have probabilities."
    return "Scores rank the items of one user, and are no probabilities."


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    """Returns a line for each part of the data."""
    lines = []
    for part, rows in data.get("rows", {}).items():
        line = f"- {part}: {rows:,} rows"
        # A log without times has rows alone.
        times = data.get(part)
        if times:
            line += f", {times['from']} to {times['to']}"
        lines.append(line)
    return lines or ["Nothing is known of the data."]


def _commands(manifest: Mapping[str, Any]) -> str:
    """Returns the commands that train the run anew and export it, from the bundle's folder."""
    # Where the run lies may tell of a person or a customer: the name of its folder alone.
    folder = shlex.quote(f"runs/{manifest.get('run', 'mine')}")
    export = [f"--workdir={folder}"]
    baseline = manifest.get("baseline")
    if baseline:
        export.append(f"--baseline={baseline['name']}")
    else:
        # By number: a later training may have another best one.
        export.append(f"--checkpoint={manifest['step']}")
    lines = [
        f"mkdir -p {folder} && cp config.json {folder}/",
        f"twotower train --workdir={folder}",
        " ".join(["twotower export", *export]),
    ]
    script = "\n".join(lines)
    return (
        "The configuration is `config.json` beside this card; the tables that it names must lie "
        "where it says. From this folder, trained anew:\n\n"
        f"```bash\n{script}\n```"
    )


def _measured(
    figures: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, Mapping[str, Any]]
) -> str:
    """Returns what was measured of the checkpoint that the bundle holds."""
    rows = []
    for part, values in figures.items():
        for name, value in values.items():
            # Figures of a checkpoint hold more than a page of them.
            if name.startswith(METRICS) and isinstance(value, (int, float)):
                ends = intervals.get(part, {}).get(name)
                # Validations and samples have none.
                between = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "-"
                rows.append([part, name, f"{value:.4f}", between])
    if not rows:
        return "Nothing was measured of this checkpoint."
    table = format_table(rows, ["rows", "metric", "value", INTERVAL], align="llrl")
    return f"Over the whole corpus, without items that the user had before:\n\n```\n{table}\n```"


def _personal(personal: Mapping[str, Any]) -> str:
    """Returns what the bundle holds about persons."""
    lines = [f"- {file}: {', '.join(columns)}" for file, columns in personal.items()]
    if not lines:
        return "The bundle holds nothing about persons."
    return "\n".join(["The bundle holds, of persons:", "", *lines])
