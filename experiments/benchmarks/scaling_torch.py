"""PyTorch on a GPU, for `scaling.py`: the same step of the same model, tensors on the card,
compiled and not.

    python -m experiments.benchmarks.scaling_torch D V B [B ...] [cpu]

Prints {"batch": B, "name": "PyTorch, torch.compile, float32", "taken": seconds a step} a line.
In-batch softmax without correction or masks, as a user of PyTorch writes it: sparse gradients of
the tables, fused Adam, float32 products in TensorFloat-32, bfloat16 by autocast; compiled once for
all batches.
"""

import json
import sys
import time

STEPS, ROUNDS, TEMPERATURE = 50, 10, 0.07


def main(width: int, rows: int, batches: list[int], device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} sees no GPU.")
    torch.set_float32_matmul_precision("high")
    forms = {
        "PyTorch, float32": (False, False),
        "PyTorch, torch.compile, float32": (True, False),
        "PyTorch, torch.compile, bfloat16": (True, True),
    }
    for name, form in forms.items():
        for batch in batches:
            taken = _seconds(width, batch, rows, device, *form)
            print(json.dumps({"batch": batch, "name": name, "taken": taken}), flush=True)


def _seconds(width: int, batch: int, rows: int, device: str, compiled: bool, half: bool) -> float:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, normalize

    def tower() -> nn.Module:
        layers = (nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        return nn.Sequential(nn.Embedding(rows, width, sparse=True), *layers).to(device)

    towers = [tower(), tower()]
    tables = [t[0].weight for t in towers]
    dense = [x for t in towers for x in t[1:].parameters()]
    optimizers = [torch.optim.Adagrad(tables, 0.1), torch.optim.Adam(dense, 1e-3, fused=True)]
    labels = torch.arange(batch, device=device)
    ids = torch.randint(1, rows, (8, 2, batch), device=device)

    def loss_of(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            queries, answers = (normalize(t(x), dim=-1) for t, x in zip(towers, (users, items)))
            return cross_entropy(queries @ answers.T / TEMPERATURE, labels)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def run() -> None:
        for i in range(STEPS):
            loss = loss_of(*ids[i % 8])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        loss.item()

    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:]) / STEPS


if __name__ == "__main__":
    numbers = [int(x) for x in sys.argv[1:] if x.isdigit()]
    main(numbers[0], numbers[1], numbers[2:], "cpu" if "cpu" in sys.argv else "cuda")
