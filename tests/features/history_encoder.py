"""An encoder with a history feature, fitted to three rows."""

import pyarrow as pa

from tests.features.encoder_shop import DAY
from twotower.features.fit import fit_encoder
from twotower.features.spec import from_mappings

LENGTH = 3
ITEM_FEATURES = {
    "item_id": {"type": "string", "embedding_size": 8, "oov_rows": 3},
    "kind": {"type": "strings", "separator": "|"},
}


def history_encoder(**history):
    """An encoder with a history of these fields; the item "new" has no training row."""
    train = {
        "user_id": ["a", "a", "b"],
        "item_id": ["x", "y", "z"],
        "timestamp": [0, 5 * DAY, 10 * DAY],
    }
    items = {"item_id": ["x", "y", "z", "new"], "kind": ["p|q", "p", None, "q"]}
    feature = {"type": "history", "max_length": LENGTH} | history
    return fit_encoder(
        from_mappings({"user": {"history": feature}, "item": ITEM_FEATURES}),
        pa.table(train),
        users=pa.table({"user_id": ["a", "b"]}),
        items=pa.table(items),
    )
