r"""Says what memory, time and money a training would take, on devices that need not be here.

    twotower plan --config=quickstart --devices=64 --kind=v5p --users=1e9 --items=1e8 --rows=1e11 \
        [--price=4.2] [--values=city=1000,brand=50000]

    twotower plan --workdir=runs/quickstart --devices=8 --kind=h100

It reads shapes alone: nothing is allocated, compiled or downloaded. With --workdir the shapes are
those of the data of a run. Bytes of the state are exact; those of a step, and its time, are read
from its trace, with what a compiler fuses assumed and the loss computed by blocks.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags

from twotower.commands import launch, mlflow_flags

FLAGS = flags.FlagValues()
_CONFIG = launch.define_config(FLAGS, required=False)
_RUN = mlflow_flags.define_run(
    FLAGS, "run", description="Run whose data and configuration are planned for."
)
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "Devices, as JAX counts them.", lower_bound=1, flag_values=FLAGS
)
_KIND = flags.DEFINE_string(
    "kind", None, "v5p, v6e, ironwood, h100, h200 or b200.", required=True, flag_values=FLAGS
)
_PRICE = flags.DEFINE_float(
    "price", 0.0, "Price of a chip for an hour.", lower_bound=0, flag_values=FLAGS
)
_USERS = flags.DEFINE_float("users", 0, "Number of users.", lower_bound=0, flag_values=FLAGS)
_ITEMS = flags.DEFINE_float("items", 0, "Number of items.", lower_bound=0, flag_values=FLAGS)
_ROWS = flags.DEFINE_float("rows", 0, "Number of training rows.", lower_bound=0, flag_values=FLAGS)
_VALUES = flags.DEFINE_list(
    "values", [], "COLUMN=NUMBER of distinct values of other columns.", flag_values=FLAGS
)


def main() -> None:
    from twotower.config import from_dict
    from twotower.core.errors import ConfigError
    from twotower.features.encoder import Encoder
    from twotower.plugins import import_plugins, load_config
    from twotower.training.planning.plan import format_plan, make_plan
    from twotower.training.planning.shapes import parse_values, planned_shapes, prepared_shapes
    from twotower.training.run import encoder_folder, load_data, local_folder

    # As floats, since people write 1e9; counted whole below.
    sizes = {"users": _USERS.value, "items": _ITEMS.value, "rows": _ROWS.value}
    if _RUN.workdir.value or _RUN.is_of_mlflow:
        # Refused: a plan for other sizes than those of the run would be taken for its own.
        if _CONFIG.value is not None or any(sizes.values()) or _VALUES.value:
            raise ConfigError(
                f"--workdir={_RUN.workdir.value or '...'} has a configuration and sizes of its "
                "own: leave out --config, --users, --items, --rows and --values."
            )
        workdir = local_folder(_RUN.folder())
        config = load_config(workdir)
        encoder = Encoder.load(encoder_folder(workdir))
        shapes = prepared_shapes(load_data(workdir, config, encoder))
    else:
        if _CONFIG.value is None:
            raise ConfigError("--config=... is required, or --workdir=... of a run.")
        for name, size in sizes.items():
            # Each is needed: a table of no rows would be planned for without a word.
            if size < 1:
                raise ConfigError(
                    f"--{name}={size:g} must be at least 1: how many {name} the log has."
                )
        config = from_dict(_CONFIG.value)
        # No run, whose folder may not hold plugins.
        import_plugins(config.plugins, Path(os.devnull))
        shapes = planned_shapes(
            config,
            users=int(_USERS.value),
            items=int(_ITEMS.value),
            rows=int(_ROWS.value),
            values=parse_values(_VALUES.value),
        )
    plan = make_plan(config, shapes, devices=_DEVICES.value, kind=_KIND.value)
    print(format_plan(plan, price=_PRICE.value))
