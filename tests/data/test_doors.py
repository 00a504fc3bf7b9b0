"""A value is the same by every door: CSV, Parquet, frame, single value of a request, saved again.

Columns of ids, times and numbers are drawn at random, each from a few spellings of known values.
TWOTOWER_CASES=2000 draws that many; a hundred by default.
"""

import dataclasses
import datetime
import decimal
import os
import random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import DataConfig, TableConfig
from twotower.core.arrow import BadValue
from twotower.core.ids import IdForm
from twotower.core.times import UNITS_PER_SECOND as UNITS
from twotower.core.times import TimeForm
from twotower.data.contract import Contract, NumberForm, Use
from twotower.data.sources.load import SOURCES, Tables, load_dataset

CASES = int(os.environ.get("TWOTOWER_CASES", "100"))
LETTERS = "abcXYZ019 _-.é"
FORMATS = ("", "%d/%m/%Y %H:%M:%S", "%Y%m%d%H%M%S", "%m/%d/%Y %I:%M:%S %p", "%d.%m.%y %H:%M:%S")


def draw_ids(rng, count):
    """Ids as text of one kind, and whether all are whole numbers."""
    kind = rng.choice(("digits", "floats", "codes", "text"))
    if kind == "digits":
        return [str(rng.randrange(-50, 10**9)) for _ in range(count)], True
    if kind == "floats":
        return [f"{rng.randrange(10**6)}.{'0' * rng.randint(1, 2)}" for _ in range(count)], True
    if kind == "codes":
        return [f"0{rng.randrange(10**4)}" for _ in range(count)], False
    texts = ["".join(rng.choices(LETTERS, k=rng.randint(1, 8))).strip() for _ in range(count)]
    # A letter keeps them from being numbers, or missing.
    return [f"x{text}" for text in texts], False


def spell_time(rng, seconds, form):
    """A text of a moment in a form."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    if form.format:
        return moment.strftime(form.format)
    number = seconds * UNITS[form.unit] + rng.randrange(UNITS[form.unit])
    texts = (
        str(number),
        moment.isoformat(),
        moment.strftime("%Y-%m-%d %H:%M:%SZ"),
        moment.strftime("%Y-%m-%d %H:%M:%S UTC"),
        moment.strftime("%Y-%m-%dT%H:%M:%S.5+00:00"),
    )
    return rng.choice(texts)


def spell_number(rng, number, form):
    text = f"{number:,.2f}".replace(",", "T").replace(".", form.decimal)
    text = text.replace("T", form.thousands)
    mark = rng.choice(("", *form.marks))
    return f"{text} {mark}".strip()


def random_log(rng):
    """Texts of a log of a few rows, its options, and the values that they stand for."""
    count = rng.randint(2, 12)
    users, users_are_digits = draw_ids(rng, count)
    items, items_are_digits = draw_ids(rng, count)
    format = rng.choice(FORMATS)
    time = TimeForm(rng.choice(tuple(UNITS)), format) if not format else TimeForm(format=format)
    seconds = [rng.randrange(10**9, 1_750_000_000) for _ in range(count)]
    decimal_sign, thousands = rng.choice(((".", ""), (".", ","), (",", "."), (",", "")))
    number = NumberForm(decimal_sign, thousands, rng.choice(((), ("$",), ("€", "%"))))
    prices = [rng.randrange(-(10**7), 10**9) / 100 for _ in range(count)]
    pad = rng.choice(("", " "))
    texts = {
        "user_id": [f"{pad}{user}{pad}" for user in users],
        "item_id": items,
        "timestamp": [spell_time(rng, second, time) for second in seconds],
        "price": [spell_number(rng, price, number) for price in prices],
    }
    options: dict[str, Any] = {
        "timestamp_unit": time.unit,
        "timestamp_format": time.format,
        **dataclasses.asdict(number),
    }
    if users_are_digits:
        users = [str(int(float(user))) for user in users]
    if items_are_digits:
        items = [str(int(float(item))) for item in items]
    return (
        texts,
        options,
        {"user_id": users, "item_id": items, "timestamp": seconds, "price": prices},
    )


USES = {"user": {"price": Use("number", "features.user.price")}}


def assert_values(table, expected, door):
    for name in ("user_id", "item_id", "timestamp"):
        assert table[name].to_pylist() == expected[name], (door, name)
    np.testing.assert_allclose(table["price"].to_pylist(), expected["price"], rtol=1e-12)


@pytest.mark.parametrize("block", range(4))
def test_a_value_is_the_same_by_every_door(tmp_path, block):
    for case in range(block, CASES, 4):
        rng = random.Random(case)
        texts, options, expected = random_log(rng)
        frame = pd.DataFrame(texts)
        frame.to_csv(tmp_path / "log.csv", index=False)
        pq.write_table(pa.table(texts), tmp_path / "log.parquet")
        doors = {}
        for suffix in ("csv", "parquet"):
            path = str(tmp_path / f"log.{suffix}")
            config = DataConfig(
                source="csv",
                interactions=TableConfig(path=path, **options),
            )
            doors[suffix] = load_dataset(config, uses=USES)
        for door, data in doors.items():
            assert_values(data.interactions, expected, (case, door))
            # Saved with the run and read back, as a server does.
            contract = Contract.from_dict(data.contract.to_dict())
            for name in ("user_id", "item_id"):
                assert contract.ids(name, texts[name]).to_pylist() == expected[name], (case, name)
            assert contract.times(texts["timestamp"]).to_pylist() == expected["timestamp"], case
            read = contract.column("user", "price", pa.chunked_array([texts["price"]]))
            np.testing.assert_allclose(read.to_pylist(), expected["price"], rtol=1e-12)


def values_of(rng):
    """A value of any type that a caller may send."""
    number = rng.choice((0, 1, -1, 7, 2**31, 2**53 + 1, 2**63, 10**30, rng.randrange(10**12)))
    moment = datetime.datetime.fromtimestamp(rng.randrange(2**32), datetime.UTC)
    return rng.choice(
        (
            number,
            float(number),
            number / 7,
            np.int64(number % 2**62),
            np.float32(number),
            decimal.Decimal(number) / 4,
            str(number),
            f" {number}.0",
            "".join(rng.choices(LETTERS + "\x00\ufeff\u0301\ud800", k=rng.randint(0, 6))),
            None,
            float("nan"),
            float("inf"),
            pd.NaT,
            pd.Timestamp(moment),
            moment,
            moment.replace(tzinfo=None),
            moment.date(),
            moment.time(),
            np.datetime64(int(moment.timestamp()), "s"),
            datetime.timedelta(1),
            True,
            b"x",
            [1],
            {"a": 1},
            object(),
            1j,
        )
    )


def test_single_values_are_read_as_columns_are_or_refused_by_the_packages_own_error():
    rng = random.Random(0)
    for _ in range(5 * CASES):
        value = values_of(rng)
        forms = (
            rng.choice(tuple(IdForm)),
            TimeForm(rng.choice(tuple(UNITS))),
            TimeForm(format=rng.choice(FORMATS)),
        )
        for form in forms:
            try:
                read = form.one(value)
            except BadValue:
                continue
            try:
                column = pa.chunked_array([pa.array([value], from_pandas=True)])
            # Wider than Arrow's own types.
            except (pa.ArrowException, OverflowError, TypeError, ValueError):
                continue
            assert form.column(column).to_pylist() == [read], (form, value)


def test_frames_are_doors_too():
    rng = random.Random(1)
    texts, options, expected = random_log(rng)
    SOURCES["doors"] = lambda config: Tables(pd.DataFrame(texts))
    try:
        data = load_dataset(
            DataConfig(source="doors", interactions=TableConfig(**options)), uses=USES
        )
    finally:
        del SOURCES["doors"]
    assert_values(data.interactions, expected, "frame")
