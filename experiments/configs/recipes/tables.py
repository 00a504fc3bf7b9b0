r"""Files as they come: other encodings, delimiters, names of columns, and forms of time.

    python -m experiments.train --config=experiments/configs/recipes/tables.py:dates \
        --workdir=runs/tables
    python -m experiments.export --workdir=runs/tables
    python -m experiments.evaluate --workdir=runs/tables --k=10

The small files that it reads lie in `examples/tables/`. Each has every time twice, as text and as a
number.
"""

from pathlib import Path

from twotower.experiment import read

FOLDER = Path(__file__).parents[2] / "examples" / "tables"
RECIPES = ("dates", "numbers", "random_split")


def get_config(recipe="dates"):
    config = read("recipes/shop")
    config.data.source = "csv"
    data = config.data
    data.interactions.path = f"{FOLDER}/events.csv"
    data.interactions.encoding = "latin-1"
    data.user_table.path = f"{FOLDER}/users.csv"
    data.user_table.encoding = "utf-16"
    data.item_table.path = f"{FOLDER}/items.csv"
    # An item on several shelves has a row for each of them.
    data.item_table.gather = ("shelf",)
    if recipe == "numbers":
        numeric_times(data)
    else:
        textual_times(data)

    config.features.user = {
        "city": {"type": "string", "embedding_size": 8},
        "joined": {"type": "timestamp", "embedding_size": 4},
        "history": {"type": "history", "max_length": 20},
    }
    config.features.item.shelf = {"type": "strings", "embedding_size": 4}
    config.features.item.created = {"type": "timestamp", "embedding_size": 4}
    # Users and items with fewer than three rows are left out; of repeated pairs the last stays.
    data.k_core = 3
    data.duplicates = "last"
    config.training.batch_size = 128
    config.training.steps = 100
    config.training.validate_every = 50

    if recipe == "random_split":
        config.split.kind = "random"
        config.split.seed = 7
        # Rows of one moment lie on both sides, so that figures of such a split flatter.
        config.split.accept_leakage = ("random_split",)
        # Guests are in no table of customers, and may be the greater half.
        data.accept = ("unmatched_users",)
        return config
    config.split.kind = "fixed"
    config.split.held = "latest"
    # Validation is the end of each user's rows, and the rows of users end at different times.
    config.split.accept_leakage = ("time_order",)
    data.test.path = f"{FOLDER}/test.txt"
    data.test.delimiter = ";"
    data.test.encoding = "utf-8-sig"
    data.test.names = ("who", "what", "when", "when_ms")
    # A title, then the header as a comment; a quote is a letter like others.
    data.test.skip_lines = 1
    data.test.comment = "#"
    data.test.quoting = "off"
    data.test.bad_rows = "skip"
    return config


def textual_times(data):
    """Reads the columns whose times are text."""
    data.interactions.columns = {"timestamp": "time"}
    data.interactions.timestamp_format = "%Y-%m-%d %H:%M:%S"
    data.user_table.timestamp_format = "%d.%m.%Y"
    data.item_table.timestamp_format = "%d/%m/%Y"
    data.test.columns = {"user_id": "who", "item_id": "what", "timestamp": "when"}
    data.test.timestamp_format = "%d/%m/%Y %H:%M:%S"


def numeric_times(data):
    """Reads the columns whose times are milliseconds."""
    data.interactions.columns = {"timestamp": "time_ms"}
    data.interactions.timestamp_unit = "ms"
    data.user_table.columns = {"joined": "joined_ms"}
    data.user_table.timestamp_unit = "ms"
    data.item_table.columns = {"created": "created_ms"}
    data.item_table.timestamp_unit = "ms"
    data.test.columns = {"user_id": "who", "item_id": "what", "timestamp": "when_ms"}
    data.test.timestamp_unit = "ms"
