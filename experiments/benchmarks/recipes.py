"""Trains every recipe on the small generated shop and prints what each gives, in one table.

    python -m experiments.benchmarks.recipes [--quick] [--json=FILE]

Recall, NDCG and coverage at 10 on the test rows, seen items masked, beside popularity, item-kNN and
EASE. The shop is small and one seed is trained: a difference below .01 is none. What the table
shows is what an option does to the lists, not which one is best for other data.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import tempfile
import time
from pathlib import Path

from absl import app

from experiments.benchmarks import harness
from experiments.configs import recipes
from twotower import api
from twotower.config import from_dict
from twotower.core.tables import format_table

METRICS = ("recall@10", "ndcg@10", "coverage@10", "novelty@10")


def variants() -> list[tuple[str, str]]:
    """Returns the file and the name of every recipe, the plain one first."""
    files = sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))
    files.sort(key=lambda name: name != "shop")
    found = []
    for file in files:
        module = importlib.import_module(f"{recipes.__name__}.{file}")
        found += [(file, recipe) for recipe in module.RECIPES]
    return found


def measure(file: str, recipe: str, workdir: Path, *, baselines: bool) -> dict[str, dict]:
    """Trains one recipe; returns what it gives by its name, that of the baselines below."""
    module = importlib.import_module(f"{recipes.__name__}.{file}")
    config = module.get_config(recipe)
    if harness.QUICK.value:
        config.training.passes = 0.0
        config.training.steps = config.training.validate_every
    start = time.perf_counter()
    run = api.train(from_dict(config), workdir)
    seconds = time.perf_counter() - start
    if file == "vectors":
        api.export(run)
    measured = api.evaluate(run, ks=(10,), baselines=baselines)
    found = {f"{file}:{recipe}": measured["model"] | {"seconds": seconds}}
    for name, values in measured.get("baselines", {}).items():
        found[f"({name})"] = values
    return found


def as_row(name: str, values: dict) -> list[str]:
    """Returns the cells of a line, "-" for what was not measured."""
    figures = [values.get(metric) for metric in METRICS]
    cells = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
    seconds = values.get("seconds")
    return [name, *cells, "-" if seconds is None else f"{seconds:.0f}"]


def main(argv: list[str]) -> None:
    del argv
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (file, recipe) in enumerate(variants()):
            workdir = Path(folder) / f"{file}-{recipe}"
            found |= measure(file, recipe, workdir, baselines=number == 0)
            print(f"{file}:{recipe}", flush=True)
    rows = [as_row(name, values) for name, values in found.items()]
    print(format_table(rows, ["recipe", *METRICS, "seconds"], align="lr"))
    if harness.JSON.value:
        Path(harness.JSON.value).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    app.run(main)
