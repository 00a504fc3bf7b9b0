"""TensorFlow Recommenders, tuned: a cached dataset of ready batches, the best number of steps an
execution, XLA where faster."""

from __future__ import annotations

import functools
from collections.abc import Callable

from experiments.benchmarks.contestants.turn import (
    ACCUMULATOR,
    HIDDEN,
    INTERACTIONS,
    ITEMS,
    RATE,
    TEMPERATURE,
    USERS,
    WIDTH,
    fastest,
    interactions,
    serve,
)


def step(*, batch: int, tuned: bool, quick: bool) -> tuple[Callable[[int], None], str]:
    """Passes over the data: a step an execution, as by default, or the fastest of one or a pass,
    compiled by XLA or not; in the faster of float32 and bfloat16."""
    import tensorflow as tf
    import tensorflow_recommenders as tfrs

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    steps = INTERACTIONS // batch
    kinds = {"steps_per_execution=1": (1, False)}
    if tuned:
        kinds = {f"steps_per_execution={steps}": (steps, False)}
    if tuned and not quick:
        kinds[f"steps_per_execution={steps}, jit_compile"] = (steps, True)
    makes = {}
    for name, kind in kinds.items():
        for half in (False,) if quick else (False, True):
            key = f"{name}, {'bfloat16' if half else 'float32'}"
            makes[key] = functools.partial(_passes, batch, *kind, half)
    best, run = fastest(makes, rounds=3 if quick else 5)
    versions = f"tensorflow {tf.__version__}, tensorflow-recommenders {tfrs.__version__}"
    return run, f"{versions}, {best}"


def _passes(batch: int, together: int, compiled: bool, half: bool) -> Callable[[int], None]:
    import tensorflow as tf
    import tensorflow_recommenders as tfrs

    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16" if half else "float32")

    def tower(rows: int) -> tf.keras.Model:
        layers = [
            tf.keras.layers.Embedding(rows, WIDTH),
            tf.keras.layers.Dense(HIDDEN, "relu"),
            tf.keras.layers.Dense(WIDTH),
        ]
        return tf.keras.Sequential(
            [
                *layers,
                tf.keras.layers.Lambda(lambda x: tf.math.l2_normalize(x, -1), dtype="float32"),
            ]
        )

    class Model(tfrs.Model):
        def __init__(self):
            super().__init__()
            self.towers = [tower(USERS + 1), tower(ITEMS + 1)]
            self.task = tfrs.tasks.Retrieval(temperature=TEMPERATURE)

        def compute_loss(self, inputs, training=False):
            return self.task(*(f(x) for f, x in zip(self.towers, inputs)), compute_metrics=False)

    users, items = interactions()
    data = (
        tf.data.Dataset.from_tensor_slices((users, items))
        .shuffle(INTERACTIONS)
        .batch(batch, drop_remainder=True)
    )
    steps = INTERACTIONS // batch
    data = data.cache().shuffle(steps).repeat().prefetch(2)
    model = Model()
    optimizer = tf.keras.optimizers.Adagrad(
        RATE, initial_accumulator_value=ACCUMULATOR, jit_compile=compiled
    )
    model.compile(optimizer, steps_per_execution=together, jit_compile=compiled)

    def run(repeats: int) -> None:
        model.fit(data, epochs=1, steps_per_epoch=steps * repeats, verbose=0)

    return run


if __name__ == "__main__":
    serve({"step": step})
