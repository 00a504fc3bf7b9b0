"""PyTorch's losses without logits on a GPU, for `loss_gpu.py`: those that are installed.

    python -m experiments.benchmarks.loss_torch D B [B ...] [cpu]

Value and gradient, by queries and items, of the in-batch softmax without masks and corrections,
which these losses do not have; operands in bfloat16. Prints a line for each, as JSON: {"batch": B,
"name": "torch, linear_cross_entropy", "taken": seconds}, or "missing" and why in the place of the
time.

    torch, cross_entropy        the [B, B] logits, by torch.compile
    torch, linear_cross_entropy of PyTorch 2.13 and later, in chunks of the batch
    CCE                         cut_cross_entropy, which leaves small gradients out by default
    CCE, exact                  the same with all gradients
    Liger                       liger_kernel, in chunks of the batch
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 5
SECONDS = 0.2  # a round at least
TEMPERATURE = 0.1
LARGEST_WITH_LOGITS = 32_768


def main(width: int, batches: list[int], device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} sees no GPU.")
    for name, make in LOSSES.items():
        for batch in batches:
            line: dict[str, Any] = {"batch": batch, "name": name}
            try:
                line["taken"] = _seconds(make(), width, batch, device, name)
            # Whatever a peer lacks, ours have been measured and the next one may work.
            except Exception as error:
                line["missing"] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(json.dumps(line), flush=True)


def _cross_entropy() -> Callable:
    import torch
    from torch.nn.functional import cross_entropy

    def loss(queries: Any, items: Any, labels: Any) -> Any:
        return cross_entropy((queries @ items.T).float(), labels, reduction="sum")

    return torch.compile(loss)


def _linear_cross_entropy() -> Callable:
    import torch
    from torch.nn.functional import linear_cross_entropy

    def loss(queries: Any, items: Any, labels: Any) -> Any:
        # Without options the logits are formed whole.
        options = torch.nn.LinearCrossEntropyOptions()
        return linear_cross_entropy(queries, items, labels, reduction="sum", options=options)

    return loss


def _cut_cross_entropy(**options: Any) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def loss(queries: Any, items: Any, labels: Any) -> Any:
        return linear_cross_entropy(queries, items, labels, reduction="sum", **options)

    return loss


def _liger() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def loss(queries: Any, items: Any, labels: Any) -> Any:
        return liger(items, queries, labels)

    return loss


LOSSES = {
    "torch, linear_cross_entropy": _linear_cross_entropy,
    "CCE": _cut_cross_entropy,
    "CCE, exact": lambda: _cut_cross_entropy(filter_eps=None),
    "Liger": _liger,
    # Last: compiling takes PyTorch longest.
    "torch, cross_entropy": _cross_entropy,
}


def _seconds(loss_of: Callable, width: int, batch: int, device: str, name: str) -> float:
    import torch

    if name == "torch, cross_entropy" and batch > LARGEST_WITH_LOGITS:
        raise MemoryError(f"{batch:,} x {batch:,} logits")
    torch.manual_seed(0)

    def vectors(factor: float) -> torch.Tensor:
        drawn = torch.randn(batch, width, device=device) * factor / width**0.5
        return drawn.to(torch.bfloat16).requires_grad_()

    queries = vectors(1 / TEMPERATURE)
    items = vectors(1.0)
    labels = torch.arange(batch, device=device)

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            loss_of(queries, items, labels).backward()
            queries.grad = None
            items.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    run(1)
    times = 1 + int(SECONDS / run(1))
    return min(run(times) for _ in range(ROUNDS))


if __name__ == "__main__":
    numbers = [int(x) for x in sys.argv[1:] if x.isdigit()]
    main(numbers[0], numbers[1:], "cpu" if "cpu" in sys.argv else "cuda")
