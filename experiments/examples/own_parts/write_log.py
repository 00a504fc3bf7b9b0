"""Writes a small log as the SQLite database of an application: tables events and products.

python experiments/examples/own_parts/write_log.py shop.db
"""

import random
import sqlite3
import sys

USERS = 300
PRODUCTS = 120
EVENTS = 4000
CATEGORIES = ("lamps", "clocks", "chairs", "rugs")
ADJECTIVES = ("red", "small", "oak", "old", "quiet", "very large")


def write_log(path: str) -> None:
    """Writes the database.

    Args:
        path: File to write; one that is there already is an error.
    """
    draw = random.Random(0)
    products = []
    for number in range(PRODUCTS):
        category = CATEGORIES[number % len(CATEGORIES)]
        title = f"{draw.choice(ADJECTIVES)} {category[:-1]} {number}"
        products.append((f"p{number}", title, category, round(draw.uniform(5, 90), 2)))
    events = []
    for minute in range(EVENTS):
        user = draw.randrange(USERS)
        # Three of four events are of the category that the user likes.
        liked = draw.random() < 0.75
        category = user % len(CATEGORIES) if liked else draw.randrange(len(CATEGORIES))
        number = len(CATEGORIES) * draw.randrange(PRODUCTS // len(CATEGORIES)) + category
        kind = draw.choice(("view", "view", "purchase"))
        events.append((f"u{user}", f"p{number}", 1_700_000_000 + 60 * minute, kind))
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE products (id TEXT, title TEXT, category TEXT, price REAL)")
        database.execute("CREATE TABLE events (user TEXT, product TEXT, time INTEGER, kind TEXT)")
        database.executemany("INSERT INTO products VALUES (?, ?, ?, ?)", products)
        database.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", events)
    database.close()


if __name__ == "__main__":
    write_log(sys.argv[1])
