"""The time to encode interactions. Ten million rows with two id columns must take under a minute.

    python -m experiments.benchmarks.encode [--quick] [--json=FILE]

The generated shop's log: the encoder is fitted on all rows and then encodes their two id columns.
Beside it, in turns, the loop that users write first: a dictionary looked up row by row, on a
hundredth of the rows.
"""

from __future__ import annotations

from absl import app

from experiments.benchmarks import harness
from twotower.data.shop.generate import generate
from twotower.features.fit import fit_encoder
from twotower.features.spec import from_mappings


def main(argv: list[str]) -> None:
    rows = 1_000_000 if harness.QUICK.value else 10_000_000
    log = generate(rows, seed=0).interactions
    spec = from_mappings(
        {"user": {"user_id": {"type": "string"}}, "item": {"item_id": {"type": "string"}}}
    )
    users, items = (
        log.select([name]).group_by(name).aggregate([]) for name in ("user_id", "item_id")
    )
    encoder = fit_encoder(spec, log, users=users, items=items)
    part = log.slice(0, rows // 100)

    def columnar() -> None:
        encoder.encode("user", log)
        encoder.encode("item", log)

    def by_row() -> None:
        for name in ("user_id", "item_id"):
            rows_of: dict[str, int] = {}
            for value in part[name].to_pylist():
                rows_of.setdefault(value, len(rows_of))

    fit = lambda: fit_encoder(spec, log, users=users, items=items)  # noqa: E731
    times = harness.alternate(
        {"fit": fit, "encode": columnar, "by row": by_row}, rounds=3, repeats=1
    )
    times["by row"] = [100 * t for t in times["by row"]]
    harness.report(
        "encode", times, unit=f"ms for {rows:,} interactions, two id columns", base="encode"
    )


if __name__ == "__main__":
    app.run(main)
