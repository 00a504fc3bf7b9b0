"""PyTorch, tuned: tensors made once, no DataLoader, one thread on its one core, compiled where that
is faster."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from experiments.benchmarks.contestants.turn import (
    ACCUMULATOR,
    EXPANSION,
    FILMS,
    HIDDEN,
    INTERACTIONS,
    ITEMS,
    RATE,
    TEMPERATURE,
    USERS,
    WIDTH,
    fastest,
    interactions,
    sequences,
    serve,
    table_ids,
    table_targets,
)


def tables(*, kind: str, rows: int, batch: int) -> tuple[Callable[[int], None], str]:
    """Steps of one table: look up, a pointwise loss, its gradient, the optimizer's update."""
    import torch
    from torch.nn.functional import softplus

    torch.set_num_threads(1)
    sparse = kind != "dense_adam"
    table = torch.nn.Embedding(rows, WIDTH, sparse=sparse)
    optimizers = {
        "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
        "lazy_adam": lambda p: torch.optim.SparseAdam(p, 0.001),
        "dense_adam": lambda p: torch.optim.Adam(p, 0.001, fused=True),
    }
    optimizer = optimizers[kind](list(table.parameters()))
    ids = itertools.cycle(torch.from_numpy(table_ids(rows, batch)).unbind())
    targets = torch.from_numpy(table_targets(batch))

    def run(repeats: int) -> None:
        for _ in range(repeats):
            loss = softplus(-(table(next(ids)) * targets).sum(-1)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    return run, f"torch {torch.__version__}"


def step(*, batch: int, tuned: bool, quick: bool) -> tuple[Callable[[int], None], str]:
    """Passes over the data: as one writes them, or by the fastest way; in the faster of float32 and
    bfloat16."""
    import torch

    torch.set_num_threads(1)
    # (gradients of tables are sparse, the loss is compiled, the optimizer too, its update is fused)
    kinds = {"eager": (False, False, False, False)}
    if tuned:
        kinds = {"torch.compile of the whole step": (False, True, True, False)}
    if tuned and not quick:
        kinds |= {
            "torch.compile of the loss, fused Adagrad": (False, True, False, True),
            "eager, fused Adagrad": (False, False, False, True),
            "eager, sparse tables": (True, False, False, True),
        }
    makes = {}
    for name, kind in kinds.items():
        for half in (False, True):
            key = f"{name}, {'bfloat16' if half else 'float32'}"
            makes[key] = functools.partial(_passes, batch, half, *kind)
    best, run = fastest(makes, rounds=3 if quick else 5)
    return run, f"torch {torch.__version__}, {best}"


def _passes(
    batch: int, half: bool, sparse: bool, compiled: bool, whole: bool, fused: bool
) -> Callable[[int], None]:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, normalize

    def tower(rows: int) -> nn.Module:
        table = nn.Embedding(rows, WIDTH, sparse=sparse)
        return nn.Sequential(table, nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))

    towers = nn.ModuleList([tower(USERS + 1), tower(ITEMS + 1)])
    tables = [x.weight for x in towers.modules() if isinstance(x, nn.Embedding)]
    dense = [x for x in towers.parameters() if not any(x is t for t in tables)]
    adagrad = functools.partial(torch.optim.Adagrad, lr=RATE, initial_accumulator_value=ACCUMULATOR)
    # The fused update knows no sparse gradients; compiled as a whole, those of all parameters are
    # one loop.
    options = {"fused": True} if fused else {}
    optimizers = (
        [adagrad(dense, **options), adagrad(tables)]
        if sparse
        else [adagrad(dense + tables, **options)]
    )
    labels = torch.arange(batch)

    def loss_of(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        queries, answers = (normalize(f(x), dim=-1) for f, x in zip(towers, (users, items)))
        return cross_entropy(queries @ answers.T / TEMPERATURE, labels)

    loss_of = torch.compile(loss_of) if compiled and not whole else loss_of
    users, items = (torch.from_numpy(x).long() for x in interactions())

    def train(index: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(users[index], items[index])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    train = torch.compile(train) if whole else train

    def run(repeats: int) -> None:
        for _ in range(repeats):
            order = torch.randperm(INTERACTIONS)
            for index in order[: INTERACTIONS // batch * batch].split(batch):
                loss = train(index)
        loss.item()

    return run


def sequence(
    *, length: int, batch: int, tuned: bool, quick: bool
) -> tuple[Callable[[int], None], str]:
    """Steps of the same Transformer: blocks normalised before each part, a start token, learned
    positions, full cross-entropy; in the faster of float32 and bfloat16."""
    import torch

    torch.set_num_threads(1)
    kinds = {"torch.compile of the whole step": (True, False)} if tuned else {}
    if not tuned or not quick:
        kinds["eager, fused Adam" if tuned else "eager"] = (False, tuned)
    makes = {}
    for name, kind in kinds.items():
        for half in (False, True):
            key = f"{name}, {'bfloat16' if half else 'float32'}"
            makes[key] = functools.partial(_sequence_steps, length, batch, half, *kind)
    best, run = fastest(makes, rounds=3 if quick else 5)
    return run, f"torch {torch.__version__}, {best}"


def _sequence_steps(
    length: int, batch: int, half: bool, whole: bool, fused: bool
) -> Callable[[int], None]:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, dropout, relu, scaled_dot_product_attention

    heads, rate = 2, 0.2

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = (
                nn.Linear(WIDTH, EXPANSION * WIDTH),
                nn.Linear(EXPANSION * WIDTH, WIDTH),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            )
            added = (
                scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(x.shape)
            )
            x = x + dropout(self.out(added), rate)
            return x + dropout(self.down(relu(self.up(self.norms[1](x)))), rate)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items, self.positions = nn.Embedding(FILMS, WIDTH), nn.Embedding(length + 1, WIDTH)
            self.start, self.norm = nn.Parameter(torch.zeros(WIDTH)), nn.LayerNorm(WIDTH)
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, items: torch.Tensor) -> torch.Tensor:
            x = torch.cat(
                [self.start.expand(len(items), 1, -1), self.items(items[:, :-1]) * WIDTH**0.5], 1
            )
            x = self.norm(self.blocks(dropout(x + self.positions.weight, rate)))
            return cross_entropy(x.flatten(0, 1) @ self.items.weight.T, items.flatten())

    model = Model()
    options = {"fused": True} if fused else {}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, **options)
    users = torch.from_numpy(sequences(length)).long()

    def train(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    train = torch.compile(train) if whole else train

    def run(repeats: int) -> None:
        for _ in range(repeats):
            loss = train(users[torch.randint(len(users), (batch,))])
        loss.item()

    return run


if __name__ == "__main__":
    serve({"tables": tables, "step": step, "sequence": sequence})
