"""Ends with status 1 unless a run is better than popularity by a factor.

    python experiments/examples/pipeline/gate.py runs/mine --metric=ndcg@10 --least=1.2

It reads what `twotower evaluate --baselines` has written, and needs nothing but Python. It is a
plain ratio of two figures; `twotower compare --gate` judges by intervals.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    description = "Ends with status 1 unless a run is better than popularity by a factor."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workdir", type=Path, help="folder of the run")
    parser.add_argument("--metric", default="ndcg@10", help="metric to compare by")
    parser.add_argument("--least", type=float, default=1.2, help="least factor over popularity")
    args = parser.parse_args()
    path = args.workdir / "evaluation" / "metrics.json"
    if not path.exists():
        sys.exit(f"{path} is missing: twotower evaluate --workdir={args.workdir} --baselines")
    measured = json.loads(path.read_text(encoding="utf-8"))
    if "baselines" not in measured:
        sys.exit(f"{path} has no baselines: evaluate the run with --baselines.")
    model = measured["model"][args.metric]
    popularity = measured["baselines"]["popularity"][args.metric]
    line = f"{args.metric}: {model:.4f}, popularity {popularity:.4f}, least {args.least:g} times it"
    # Not a quotient: popularity may find nothing at all.
    if model < args.least * popularity:
        sys.exit(f"{line}: not good enough.")
    print(f"{line}: good enough.")


if __name__ == "__main__":
    main()
