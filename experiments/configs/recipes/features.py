r"""Features and rows of one's own tables.

    python -m experiments.train --config=experiments/configs/recipes/features.py:own_tables \
        --workdir=runs/features
    python -m experiments.export --workdir=runs/features
    python -m experiments.evaluate --workdir=runs/features --k=10

The small files that it reads lie in `examples/tables/`. Validation and test rows have files of
their own, whose times are text, or numbers in `times_in_ms`.
"""

from pathlib import Path

from twotower.config import defaults

FOLDER = Path(__file__).parents[2] / "examples" / "tables"
RECIPES = ("own_tables", "times_in_ms")


def get_config(recipe="own_tables"):
    config = defaults()
    config.data.source = "csv"
    config.data.interactions.path = f"{FOLDER}/events.csv"
    config.data.interactions.encoding = "latin-1"
    config.data.interactions.columns = {"timestamp": "time"}
    config.data.item_table.path = f"{FOLDER}/items.csv"
    # Prices such as "1.052,41 SAR", and a dash where the stock is not known.
    config.data.item_table.decimal = ","
    config.data.item_table.thousands = "."
    config.data.item_table.marks = ("SAR",)
    config.data.item_table.missing = ("", "-")
    config.split.kind = "fixed"
    # Customers come back to what they viewed, later as well.
    config.split.accept_leakage = ("repeated_pairs",)
    for table, name in ((config.data.validation, "validation"), (config.data.test, "latest")):
        table.path = f"{FOLDER}/{name}.txt"
        table.delimiter = ";"
        table.encoding = "utf-8-sig"
        table.names = ("who", "what", "when", "when_ms")
        columns = {"user_id": "who", "item_id": "what", "timestamp": "when"}
        table.timestamp_format = "%d/%m/%Y %H:%M:%S"
        if recipe == "times_in_ms":
            columns["timestamp"] = "when_ms"
            table.timestamp_format = ""
            table.timestamp_unit = "ms"
        table.columns = columns

    # The last days come in a file of views alone.
    config.data.test.path = ""
    config.data.test.event_files = {"view": f"{FOLDER}/latest.txt"}

    # A purchase trains ten times as much as a view, and counts as much in the mean of the past.
    config.data.event_weights = {"view": 1.0, "add_to_cart": 5.0, "purchase": 10.0}
    # Another system writes "View" and "Purchase".
    config.data.fold_events = True

    config.features.user = {
        "user_id": {"type": "string", "embedding_size": 16},
        "history": {"type": "history", "max_length": 20},
    }
    config.features.item = {
        "item_id": {"type": "string", "embedding_size": 16},
        # Two columns as one text; items without a description have their title alone.
        "words": {
            "type": "text",
            "columns": ("title", "description"),
            "buckets": 2048,
            "max_length": 24,
            "embedding_size": 8,
        },
        # An amount is one number, normalised, which a dense layer spreads over 4.
        "stock": {"type": "int", "normalize": True, "embedding_size": 4},
        # A code, of which neighbours have something in common, has a row for each bucket.
        "shelf": {"type": "int", "buckets": 8, "embedding_size": 4},
        # Prices span orders of magnitude: their logarithm is normalised.
        "price": {"type": "float", "log": True, "embedding_size": 4},
        # Vectors of another model, "[0.1, -2, ...]" in the CSV; one item has none.
        "vector": {"type": "pretrained", "projection": 8, "missing": "zeros"},
    }
    config.model.history.kind = "bag"
    config.model.user.layers = (16,)
    config.model.item.layers = (16,)

    # Twenty times over all rows, with a validation after each.
    config.training.passes = 20.0
    config.training.batch_size = 128
    config.training.log_every = 20
    config.evaluation.ks = (10,)
    return config
