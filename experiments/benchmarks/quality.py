"""The ranking quality of negatives and corrections. The same model, steps and temperature, with one
objective after another.

    python -m experiments.benchmarks.quality [--data=movielens_100k,yelp2018] [--seeds=3]
    [--steps=N] [--quick] [--json=FILE]

Trains the shipped configuration with each objective and measures on a tenth of its training rows,
held out; the test rows are not looked at. Nothing is tuned for one objective alone. --quick: a
short training of each on MovieLens-100K, to see it run. TWOTOWER_DATA names the folder of the data.
"""

from __future__ import annotations

import importlib
import json
import statistics
import tempfile
from pathlib import Path

from absl import app, flags

from experiments.benchmarks import harness

_DATA = flags.DEFINE_list("data", ["movielens_100k", "yelp2018"], "Configurations to train.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Trainings of each, with as many seeds.", lower_bound=1)

_STEPS = flags.DEFINE_integer(
    "steps", 0, "Of each training; 0 takes as many as the configuration has.", lower_bound=0
)

_ALONE = {"in_batch": False, "uniform": 0}
# Name -> options of the objective; "B" stands for the batch size, so that all have as many
# negatives from each source.
OBJECTIVES = {
    "in-batch, no correction": {"logq": False, "negatives": {"uniform": 0}},
    "in-batch, logQ": {"negatives": {"uniform": 0}},
    "in-batch, corrected logQ": {"loss": "corrected_softmax", "negatives": {"uniform": 0}},
    "uniform": {"negatives": _ALONE | {"uniform": "B"}},
    "popularity^.75": {"negatives": _ALONE | {"popularity": "B"}},
    "mixed (in-batch + uniform)": {"negatives": {"uniform": "B"}},
    "BSL, uniform": {"loss": "bsl", "negatives": _ALONE | {"uniform": "B"}},
}


def main(argv: list[str]) -> None:
    figures = {}
    for name in _DATA.value[:1] if harness.QUICK.value else _DATA.value:
        print(f"\n{name}, validation\n{'':28}{'recall@20':>22}{'NDCG@20':>22}")
        for objective in OBJECTIVES:
            runs = [
                _measure(name, objective, seed)
                for seed in range(1 if harness.QUICK.value else _SEEDS.value)
            ]
            figures[f"{name}, {objective}"] = runs
            print(
                f"{objective:28}"
                + "".join(
                    _shown([run[metric] for run in runs]) for metric in ("recall@20", "ndcg@20")
                )
            )
    harness.write_json("quality", figures, unit="validation", base="")


def _shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}".rjust(22)


def _measure(name: str, objective: str, seed: int) -> dict[str, float]:
    from twotower.config import from_dict
    from twotower.evaluation.evaluate import make_validate
    from twotower.training.run import train

    values = importlib.import_module(f"experiments.configs.{name}").get_config().to_dict()
    batch = values["training"]["batch_size"]
    chosen = json.loads(json.dumps(OBJECTIVES[objective]).replace('"B"', str(batch)))
    values["objective"] |= chosen | {
        "negatives": values["objective"]["negatives"] | {"catalogue": False} | chosen["negatives"]
    }
    values["split"] |= {"validation": 0.1, "seed": 7}
    values["evaluation"] |= {"ks": (20,)}
    steps = _STEPS.value or values["training"]["steps"]
    values["training"] |= {
        "seed": seed,
        "steps": steps,
        "validate_every": steps,
        "metric": "recall@20",
    }
    if harness.QUICK.value:
        values["training"] |= {"steps": 40, "validate_every": 40, "steps_per_dispatch": 1}
    with tempfile.TemporaryDirectory() as folder:
        train(from_dict(values), Path(folder) / "run", make_validate=make_validate)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if "validation/recall@20" in line][-1]
    return {metric: last[f"validation/{metric}"] for metric in ("recall@20", "ndcg@20")}


if __name__ == "__main__":
    app.run(main)
