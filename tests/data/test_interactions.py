"""Codes and fingerprints of rows, however their columns are stored."""

import pyarrow as pa

from tests.data.logs import log_of, random_log
from twotower.core.arrow import fingerprint
from twotower.data.interactions import codes


def test_codes_number_values_in_order_of_appearance_over_chunks():
    column = pa.chunked_array([["b", "a", None], ["a", "c", "b"], []])
    assert codes(column).tolist() == [0, 1, 2, 1, 3, 0]


def test_the_fingerprint_tells_rows_apart_and_not_their_storage():
    rows = random_log(7)
    same = [
        rows,
        rows.combine_chunks(),
        pa.concat_tables([rows.slice(0, 7), rows.slice(7, 90), rows.slice(97)]),
        rows.drop_columns("row"),
    ]
    assert len({fingerprint(table) for table in same}) == 1
    other = [
        rows.slice(1),
        rows.slice(0, 399),
        rows.drop_columns("timestamp"),
        rows.take(list(range(399, -1, -1))),
        log_of(["ab", "c"], "xy"),
        log_of(["a", "bc"], "xy"),
        log_of(["a", ""], "xy"),
        log_of(["a", ""], "xy").set_column(0, "user_id", pa.array(["a", None])),
    ]
    assert len({fingerprint(table) for table in [rows, *other]}) == 1 + len(other)
