"""The ranges of options, and which go together: checked once, when a `Config` is made."""

from __future__ import annotations

import codecs
import dataclasses
import math
from typing import Any

from twotower.core.errors import ConfigError, choose


def check_ranges(config: Any) -> None:
    """Refuses the first option of a `Config` that is out of range, or does not go with another."""
    for part in (_check_data, _check_history, _check_training, _check_negatives, _check_objective):
        part(config, _Checks(config))


@dataclasses.dataclass(frozen=True)
class _Checks:
    """Each refuses a field, by its path, with its value and what would be right."""

    config: Any

    def true(self, ok: bool, field: str, right: str) -> None:
        if not ok:
            raise ConfigError(f"config.{field}={_get(self.config, field)!r} must be {right}.")

    def between(self, low: float, high: float, *fields: str) -> None:
        for field in fields:
            self.true(low <= _get(self.config, field) <= high, field, f"between {low} and {high}")

    def at_least(self, low: float, *fields: str) -> None:
        for field in fields:
            self.true(_get(self.config, field) >= low, field, f"at least {low}")

    def one_of(self, known: tuple[str, ...], *fields: str) -> None:
        for field in fields:
            choose(dict.fromkeys(known), _get(self.config, field), f"config.{field}")


def _check_data(config: Any, check: _Checks) -> None:
    check.between(
        0.0, 0.99, "split.validation", "split.test", "model.user.dropout", "model.item.dropout"
    )
    check.between(0.01, 1.0, "model.temperature")
    check.between(0.0, 1.0, "retrieval.target_recall", "training.schedule.factor")
    check.at_least(1000, "data.num_interactions")
    check.at_least(0, "evaluation.validation_queries", "data.k_core", "data.num_items")
    check.at_least(1, "retrieval.k")
    check.at_least(0, "retrieval.dim")
    check.one_of(("float32", "int8"), "retrieval.vectors")
    check.one_of(("all", "first", "last"), "data.duplicates")
    check.one_of(("user", "interaction"), "evaluation.query")
    scann = ("scann_brute_force", "scann_tree", "scann_tree_ah")
    check.one_of(("auto", "exact", *scann, "hnswlib", "faiss"), "retrieval.index")
    check.one_of(("float32", "bfloat16"), "model.dtype")
    for tower in ("model.user.layers", "model.item.layers"):
        check.true(min(_get(config, tower), default=1) >= 1, tower, "widths of at least 1")
    for table in ("interactions", "user_table", "item_table", "test"):
        check.one_of(("s", "ms", "us", "ns"), f"data.{table}.timestamp_unit")
        delimiter, encoding = f"data.{table}.delimiter", f"data.{table}.encoding"
        check.true(
            bool(_get(config, delimiter)), delimiter, "one or more characters, such as ',' or '\\t'"
        )
        check.true(
            _is_encoding(_get(config, encoding)),
            encoding,
            "an encoding that Python knows, such as 'utf-8'",
        )
        path, query = f"data.{table}.path", f"data.{table}.query"
        if _get(config, query):
            check.true(
                config.data.source == "bigquery",
                query,
                "empty unless config.data.source='bigquery'",
            )
            check.true(not _get(config, path), path, f"empty beside a config.{query}")
    ks = config.evaluation.ks
    check.true(
        bool(ks) and min(ks, default=0) >= 1,
        "evaluation.ks",
        "one or more list lengths of at least 1",
    )


def _check_history(config: Any, check: _Checks) -> None:
    check.between(0.0, 0.99, "model.history.dropout")
    check.at_least(0, "model.history.width")
    check.at_least(1, *(f"model.history.{name}" for name in ("blocks", "heads", "expansion")))
    check.one_of(("interactions", "sequences"), "training.examples")
    check.one_of(("last", "random"), "training.crop")
    if config.training.examples == "interactions":
        right = "'last' with config.training.examples='interactions', whose histories are the latest events always"
        check.true(config.training.crop == "last", "training.crop", right)
        return
    needed = {
        "model.history.kind": ("causal", ": in other kinds a position knows what is after it"),
        "objective.negatives.queue": (
            0,
            ", whose batches have another number of positives each time",
        ),
        "training.accumulate": (1, ", whose batches are computed at once"),
        "model.user.batch_norm": (False, ", whose batches have empty places"),
        "model.item.batch_norm": (False, ", whose batches have empty places"),
    }
    for field, (value, why) in needed.items():
        check.true(
            _get(config, field) == value,
            field,
            f"{value!r} with config.training.examples='sequences'{why}",
        )


def _check_training(config: Any, check: _Checks) -> None:
    def training(*names: str) -> list[str]:
        return [f"training.{name}" for name in names]

    check.at_least(
        1,
        *training(
            "batch_size",
            "steps",
            "log_every",
            "validate_every",
            "keep_checkpoints",
            "schedule.patience",
        ),
    )
    check.at_least(1, *training("steps_per_dispatch", "accumulate"))
    check.at_least(
        0, *training("seed", "steps_for", "patience", "resident_megabytes", "schedule.warmup_steps")
    )
    check.at_least(
        0, *training("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm")
    )
    check.at_least(0, *training("tables.learning_rate", "tables.initial_accumulator"))
    t, parts = config.training, [config.training.validate_every, config.training.steps]
    if config.objective.negatives.mined:
        parts.append(config.objective.negatives.mined_refresh)
    fits = math.gcd(*parts)
    check.true(
        fits % t.steps_per_dispatch == 0,
        "training.steps_per_dispatch",
        f"a divisor of {fits}, so that validations (every {t.validate_every} steps), the last step ({t.steps}) and rankings of "
        "hard negatives fall between two dispatches",
    )
    check.true(
        t.batch_size % t.accumulate == 0,
        "training.accumulate",
        f"a divisor of the batch size {t.batch_size}",
    )


def _check_negatives(config: Any, check: _Checks) -> None:
    n, batch = config.objective.negatives, config.training.batch_size

    def negatives(*names: str) -> list[str]:
        return [f"objective.negatives.{name}" for name in names]

    check.at_least(-1, *negatives("uniform", "mined_margin"))
    check.at_least(
        0,
        *negatives(
            "popularity", "alpha", "queue", "queue_warmup", "queue_age", "mined", "explicit"
        ),
    )
    check.at_least(1, *negatives("mined_refresh"))
    ranks = n.mined_ranks
    check.true(
        len(ranks) == 2 and 0 <= ranks[0] < ranks[1],
        "objective.negatives.mined_ranks",
        "two ranks, the first below the second",
    )
    check.true(
        n.queue % batch == 0,
        "objective.negatives.queue",
        f"a multiple of config.training.batch_size={batch}",
    )
    steps = config.training.steps
    if n.mined:
        below = f"below config.training.steps={steps}: before the first ranking there is nothing to draw from"
        check.true(n.mined_refresh < steps, "objective.negatives.mined_refresh", below)
        others = n.in_batch or n.catalogue or n.popularity or n.uniform > 0
        check.true(
            bool(others),
            "objective.negatives.mined",
            "beside other sources: before the first ranking it has nothing",
        )
    if n.queue:
        check.true(
            n.queue_warmup < steps,
            "objective.negatives.queue_warmup",
            f"below config.training.steps={steps}",
        )
    if n.catalogue:
        for name in ("uniform", "popularity", "queue"):
            check.true(
                getattr(n, name) <= 0,
                f"objective.negatives.{name}",
                "0 with config.objective.negatives.catalogue=True, which compares with every item already",
            )


def _check_objective(config: Any, check: _Checks) -> None:
    o = config.objective
    check.at_least(
        0,
        *(
            f"objective.{name}"
            for name in ("positive_temperature", "negative_weight", "weight", "margin", "block")
        ),
    )
    check.between(0.0, 1.0, "objective.calibration")
    tasks = [o.weight, *(getattr(head, "weight", 0) for head in o.heads.values())]
    check.true(o.pos_weight > 0, "objective.pos_weight", "above 0")
    check.true(any(tasks), "objective.weight", "above 0 where there are no heads to train")


def _is_encoding(name: str) -> bool:
    try:
        return bool(codecs.lookup(name))
    except LookupError:
        return False


def _get(config: Any, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return value
