"""Random and hostile requests against a bundle with each kind of index, in a process of its own.

    python -m experiments.benchmarks.fuzz_requests [--calls=10000] [--quick] [--json=FILE]

Users, items, rows, histories, conditions, vectors and lengths of lists are drawn from what is right
and from what callers get wrong. No call may end the process, raise anything but an error of the
package, take more memory than a few lists of the corpus, return an item that was denied or not
allowed, or a list longer than the corpus.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import resource
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from absl import app, flags

from experiments.benchmarks import harness

if TYPE_CHECKING:  # a parent process loads neither
    from twotower.retrieval.bundle import Bundle
    from twotower.retrieval.retriever import Retriever

_CALLS = flags.DEFINE_integer("calls", 10_000, "Calls in all, divided over the kinds of index.")
_KIND = flags.DEFINE_string("kind", "", "Kind of index that this process attacks.")
_BUNDLE = flags.DEFINE_string("bundle", "", "Folder of the bundle that this process attacks.")
ITEMS = 1_500  # enough for a tree of ScaNN
# Bytes that all calls may add to the greatest memory of the process: compiled programs and lists.
MAX_GROWTH = 512 * 2**20
ADDRESS_SPACE = 64 * 2**30
# Kinds by the module that they need; "int8" is exact search over vectors stored so.
KINDS = {
    "exact": "numpy",
    "int8": "numpy",
    "scann_brute_force": "scann",
    "scann_tree": "scann",
    "scann_tree_ah": "scann",
    "hnswlib": "hnswlib",
    "faiss": "faiss",
    "faiss_ivf": "faiss",
}
FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 8},
        "city": {"type": "string", "embedding_size": 8},
        "joined": {"type": "timestamp", "embedding_size": 8},
        "when": {"type": "timestamp", "column": "timestamp", "embedding_size": 8},
        "history": {"type": "history", "max_length": 5, "weights": {"purchase": 5.0}},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 8},
        "price": {"type": "float"},
        "created": {"type": "timestamp", "embedding_size": 8},
        "words": {"type": "strings", "column": "title", "separator": " ", "embedding_size": 8},
    },
}


def make_retriever(folder: Path, kind: str) -> Retriever:
    """Returns the retriever of a bundle with fresh weights of the generated shop."""
    import jax

    from twotower.config import from_dict
    from twotower.pipeline.prepare import prepare
    from twotower.retrieval.bundle import write_bundle
    from twotower.retrieval.export import make_bundle
    from twotower.retrieval.retriever import Retriever
    from twotower.towers.two_tower import TwoTower
    from twotower.training.run import Run

    retrieval: dict[str, Any] = {"index": kind, "target_recall": 0.9}
    if kind == "int8":
        retrieval = {"index": "exact", "vectors": "int8"}
    values = {
        "data": {"source": "shop", "num_interactions": 5_000, "num_items": ITEMS},
        "features": FEATURES,
        "model": {"user": {"layers": (16,)}, "item": {"layers": (16,)}},
        "retrieval": retrieval,
    }
    config = from_dict(values)
    prepared = prepare(config)
    model = TwoTower.build(config.model, prepared.encoder)
    run = Run(folder, config, prepared, model, model.init(jax.random.key(0)), 0)
    bundle: Bundle = make_bundle(run)
    folder.mkdir(parents=True)
    write_bundle(bundle, folder, step=0)
    return Retriever.load(folder)


class Attack:
    """Requests drawn from a seed, right and wrong parts mixed."""

    def __init__(self, retriever: Retriever, seed: int, *, of_index: bool = True):
        """Prepares the attack.

        Args:
            retriever: Retriever to attack.
            seed: Seed of all draws.
            of_index: Whether the index itself is searched too.
        """
        self.retriever = retriever
        self.rng = np.random.default_rng(seed)
        self.users = retriever.bundle.users["user_id"].to_pylist()
        self.items = retriever.bundle.items["item_id"].to_pylist()
        self.outcomes: Counter[str] = Counter()
        self.makers = (
            self.recommend,
            self.recommend_rows,
            self.recommend_many,
            self.similar_items,
            self.look_up,
            self.encode,
            self.search,
            self.change,
        )
        # Changes wait for the disk, so they are fewer.
        shares = np.array([5, 5, 3, 3, 3, 3, 3 * of_index, 1])
        self.shares = shares / shares.sum()

    def one(self) -> None:
        """Makes one call, and checks what comes of it.

        Raises:
            AssertionError: It raised something else than an error of the package, or answered what
                it may not.
        """
        from twotower.core.errors import TwotowerError

        maker = self.makers[self.rng.choice(len(self.makers), p=self.shares)]
        call, arguments = maker()
        name = getattr(call, "__name__", str(call))
        try:
            answer = call(**arguments)
        except TwotowerError as error:
            assert str(error), f"{name}({arguments}) is refused without a word"
            self.outcomes[f"{name} refused"] += 1
            return
        except Exception as error:
            shown = f"{type(error).__name__}: {error}"
            raise AssertionError(f"{name}({_show(arguments)}) raised {shown[:500]}") from error
        self.outcomes[f"{name} answered"] += 1
        self.check(name, arguments, answer)

    def check(self, name: str, arguments: Mapping[str, Any], answer: Any) -> None:
        """Checks the items of an answer against the limits of its request."""
        if name not in ("recommend", "similar_items"):
            return
        found = [item.item_id for item in answer]
        assert len(set(found)) == len(found) <= min(arguments["k"], len(self.retriever)), arguments
        for limit, is_right in (("deny", False), ("allow", True)):
            ids = arguments.get(limit)
            if isinstance(ids, list):
                named = {str(item).strip() for item in ids}
                wrong = [item for item in found if (item in named) != is_right]
                assert not wrong or limit == "deny" and not named & set(found), arguments

    def recommend(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        return self.retriever.recommend, {"user": self.id(self.users), **self.limits()}

    def recommend_rows(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        arguments = {"rows": self.rows("user"), **self.limits(), **self.naming()}
        if self.rng.random() < 0.2:
            arguments["user"] = self.id(self.users)
        return self.retriever.recommend, arguments

    def recommend_many(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        return self.retriever.recommend_many, {"user_ids": self.ids(self.users), **self.limits()}

    def similar_items(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        limits = self.limits()
        for name in ("exclude_seen", "popularity_weight", "rerank"):
            limits.pop(name, None)
        return self.retriever.similar_items, {"item": self.id(self.items), **limits}

    def look_up(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        retriever = self.retriever
        by_user = {"user": self.id(self.users)}
        calls = (
            (retriever.item, {"item": self.id(self.items)}),
            (retriever.knows, by_user),
            (retriever.latest_items, by_user | {"k": self.k()}),
            (retriever.latest_events, by_user | {"k": self.k()}),
            (retriever.item_vectors, {"item_ids": self.ids(self.items)}),
            (retriever.embed_users, {"user_ids": self.ids(self.users)}),
        )
        return self.pick(calls)

    def encode(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        if self.rng.random() < 0.5:
            return self.retriever.encode_users, {"rows": self.rows("user"), **self.naming()}
        return self.retriever.encode_items, {"rows": self.rows("item"), **self.naming()}

    def search(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        index = self.retriever.bundle.index
        return index.search, {"queries": self.vectors(index.dim), "k": self.k()}

    def change(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        retriever = self.retriever
        if self.rng.random() < 0.3:
            return retriever.delete, {"item_ids": self.ids(self.items)}
        arguments = {"rows": self.rows("item"), **self.naming()}
        if self.rng.random() < 0.5:
            arguments["vectors"] = self.vectors(retriever.bundle.towers.dim)
        return retriever.upsert, arguments

    def pick(self, choices: Any) -> Any:
        """Returns one of some values, of which NumPy is to see none."""
        return choices[int(self.rng.integers(len(choices)))]

    def hostile(self) -> Any:
        """Returns a value that is nowhere right, or only by chance."""
        import pandas as pd

        return self.pick(
            (
                *(
                    None,
                    "",
                    " ",
                    "\t\n",
                    "\x00",
                    "\ud800",
                    "\ufeff3",
                    "é",
                    "e\u0301",
                    "x" * 100_000,
                ),
                *(True, False, 0, -1, 3, 2**31, 2**63, -(2**63), 10**30, 10**5_000, 3.0, 3.5),
                *(float("nan"), float("inf"), 2 + 1j, b"3", bytearray(b"x"), object(), print, int),
                *(np.int8(3), np.uint64(2**64 - 1), np.float32(3), np.bool_(True), np.str_("3")),
                *(np.array(3), np.array([1, 2]), np.zeros((2, 2)), np.datetime64("NaT")),
                *(np.datetime64("2023-11-01"), datetime.date(2023, 11, 1), datetime.timedelta(1)),
                *(datetime.datetime(9999, 12, 31), datetime.datetime(1, 1, 1), datetime.time(1)),
                *(decimal.Decimal("3"), decimal.Decimal("NaN"), uuid.UUID(int=3), range(3), 1e300),
                *([], (), {}, set(), [[]], [None], {"a": 1}, [{}], ["3", 3], [{"a": [1]}], [b"x"]),
                *(
                    "2023-11-01",
                    "2023-11-01T00:00:00+25:00",
                    "1e999",
                    "price",
                    "'; drop",
                    "3 ",
                    "%s",
                ),
                *(pd.NA, pd.NaT, pd.Timestamp("2023-11-01"), pd.Series([1, "a"]), pa.scalar(3)),
                *(pa.array([1, None]), pa.table({}), pd.DataFrame(), pa.scalar(None), Ellipsis),
            )
        )

    def mostly(self, right: Callable[[], Any], share: float = 0.85) -> Any:
        """Returns a right value, or now and then a hostile one."""
        return right() if self.rng.random() < share else self.hostile()

    def id(self, known: list[str]) -> Any:
        return self.mostly(lambda: self.pick((*[self.pick(known)] * 8, "nobody", 10**6, 17.0)))

    def ids(self, known: list[str]) -> Any:
        import pandas as pd
        import polars as pl

        count = int(self.rng.choice([0, 1, 3, 50]))
        right = [self.pick(known) for _ in range(count)]
        mixed = [self.id(known) for _ in range(min(count, 5))]
        kinds = (list, tuple, set, iter, np.array, pa.array, pd.Series, pl.Series, dict.fromkeys)
        wrap: Callable[[list[Any]], Any] = self.pick(kinds)
        return self.mostly(lambda: wrap(right) if self.rng.random() < 0.7 else mixed)

    def k(self) -> Any:
        lengths = (1, 5, 10, 10, ITEMS, ITEMS + 1, 10**8, 2**31, 2**63, 10**400, np.int64(7))
        return self.mostly(lambda: self.pick(lengths))

    def limits(self) -> dict[str, Any]:
        """Returns arguments that all lists have."""
        limits = {"k": self.k()}
        options: dict[str, Callable[[], Any]] = {
            "where": self.where,
            "allow": lambda: self.ids(self.items),
            "deny": lambda: self.ids(self.items),
            "exclude_seen": lambda: self.mostly(lambda: self.rng.random() < 0.5),
            "popularity_weight": lambda: self.mostly(lambda: 0.0),
            "rerank": lambda: self.mostly(lambda: self.pick(("mmr", "", "caps:column=brand"))),
        }
        for name, draw in options.items():
            if self.rng.random() < 0.2:
                limits[name] = draw()
        return limits

    def where(self) -> Any:
        conditions = [self.condition() for _ in range(int(self.rng.integers(1, 3)))]
        as_mapping = {name: value for name, _, value in conditions if isinstance(name, str)}
        return self.mostly(lambda: self.pick((conditions, as_mapping, conditions[0])))

    def condition(self) -> tuple[Any, Any, Any]:
        from twotower.data.operators import OPERATORS

        names = self.retriever.bundle.items.column_names
        name = self.mostly(lambda: self.pick(names), 0.95)
        operator = self.mostly(lambda: self.pick((*OPERATORS, "latest")), 0.95)
        is_known = isinstance(name, str) and name in names
        column = self.retriever.bundle.items[name].to_pylist() if is_known else [3]
        right = (self.pick(column), [self.pick(column), self.pick(column)], 20, "2025-01-31")
        return name, operator, self.mostly(lambda: self.pick(right), 0.8)

    def naming(self) -> dict[str, Any]:
        naming: dict[str, Any] = {}
        if self.rng.random() < 0.2:
            right = {"buyer_id": "user_id", "recent": "history", "sku": "item_id"}
            naming["names"] = self.mostly(lambda: right)
        if self.rng.random() < 0.3:
            naming["strict"] = self.mostly(lambda: False)
        return naming

    def rows(self, side: str) -> Any:
        """Returns rows of users or items in any form that callers have."""
        import pandas as pd
        import polars as pl

        count = int(self.rng.choice([0, 1, 1, 1, 1, 3]))
        records = [self.row(side) for _ in range(count)]
        if self.rng.random() < 0.6:
            return self.mostly(lambda: records, 0.95)
        for wrap in (pa.Table.from_pylist, pd.DataFrame, pl.DataFrame, tuple, iter):
            if self.rng.random() < 0.3:
                # Other libraries refuse many of these values themselves.
                try:
                    return wrap(records)
                except (Exception, pl.exceptions.PanicException):
                    return records
        return records[0] if records else self.hostile()

    def row(self, side: str) -> dict[Any, Any]:
        columns = self.retriever.bundle.items if side == "item" else self.retriever.bundle.users
        names = [*columns.column_names, "timestamp"]
        row: dict[Any, Any] = {}
        for _ in range(int(self.rng.integers(1, 4))):
            name = self.pick(names)
            if name == "history":
                row[name] = self.mostly(self.history)
            elif name in columns.column_names:
                value = self.pick(columns[name]).as_py()
                row[name] = self.mostly(functools.partial(_same, value))
            else:
                row[name] = self.mostly(lambda: self.pick((1_700_000_000, "2025-01-31", None)))
        if side == "item" and self.rng.random() < 0.8:
            row["item_id"] = self.mostly(lambda: f"new-{self.rng.integers(50)}")
        if self.rng.random() < 0.1:
            row[self.pick(("buyer_id", "recent", "sku", 3, None, "cit"))] = self.hostile()
        return row

    def history(self) -> list[Any]:
        events: list[Any] = []
        for _ in range(int(self.rng.integers(0, 8))):
            item = self.id(self.items)
            event = {"item_id": item, "event": "purchase", "timestamp": 1_700_000_000}
            if self.rng.random() < 0.2:
                event[self.pick(("event", "timestamp", "item", 3))] = self.hostile()
            events.append(self.pick((item, event)))
        return events

    def vectors(self, dim: int) -> Any:
        count = int(self.rng.integers(0, 4))
        right = self.rng.normal(size=(count, dim))
        # ScaNN ends the process on some of these where they reach it.
        spoilt = right.copy()
        if count:
            spoilt[0, 0] = self.pick((np.nan, np.inf, 1e38, 0.0))
        forms = (
            *(right, right.astype(np.float32), right.tolist(), right[:, ::-1], right.T, spoilt),
            *(np.zeros((count, dim)), right[:, :1], right * 1e30, right.astype(np.float16)),
        )
        return self.mostly(lambda: self.pick(forms))


def _same(value: Any) -> Any:
    return value


def _show(arguments: Mapping[str, Any]) -> str:
    """Returns the arguments of a call as text, whatever they are."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return repr(arguments)[:2_000]
    finally:
        sys.set_int_max_str_digits(limit)


def attack(retriever: Retriever, calls: int, seed: int, *, of_index: bool = True) -> Counter[str]:
    """Makes calls, and returns the number of each outcome.

    Arguments are those of `Attack`.

    Raises:
        AssertionError: One of them did what none may; the message shows it.
    """
    requests = Attack(retriever, seed, of_index=of_index)
    # Compiles what most calls run, so that memory is measured from there on.
    for _ in range(20):
        requests.one()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(calls):
        requests.one()
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
        assert grown <= MAX_GROWTH, f"call {number} of seed {seed}: memory grew by {grown:,} bytes"
    return requests.outcomes


def attack_here(folder: Path, kind: str, calls: int) -> None:
    """Attacks a bundle in this process, whose memory is bounded."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)
    retriever = make_retriever(folder, kind)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    outcomes = attack(retriever, calls, seed=list(KINDS).index(kind))
    refused = sum(count for name, count in outcomes.items() if name.endswith("refused"))
    print(f"{retriever.bundle.index.kind} {refused}", flush=True)


def main(argv: list[str]) -> None:
    if _KIND.value:
        attack_here(Path(_BUNDLE.value), _KIND.value, _CALLS.value)
        return
    from importlib import util

    calls = 700 if harness.QUICK.value else _CALLS.value
    kinds = [kind for kind, module in KINDS.items() if util.find_spec(module)]
    each = -(-calls // len(kinds))
    rows = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            own = (f"--kind={kind}", f"--bundle={folder}/bundle", f"--calls={each}")
            command = (sys.executable, "-m", "experiments.benchmarks.fuzz_requests", *own)
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{kind}: exit {done.returncode}\n{done.stderr[-3_000:]}")
            sys.exit(1)
        index, refused = done.stdout.split()[-2:]
        rows[kind] = {"index": index, "calls": each, "refused": int(refused)}
        print(f"{kind} ({index}): {each:,} calls, {int(refused):,} refused, none else", flush=True)
    harness.write_json("fuzz_requests", rows, unit="calls", base="")


if __name__ == "__main__":
    app.run(main)
