r"""Makes training rows of what a server has shown, and estimates what other policies would earn.

    twotower impressions --impressions=FOLDER --events=bundle.events --out=rows.parquet

    twotower impressions --impressions=FOLDER --events=bundle.events --estimate [--bundle=FOLDER]

Items that were shown and left have the label 0: `tt.fit("rows.parquet", config={"objective.label":
"label", "objective.negatives.explicit": 4})` takes them as negatives of their users. The estimate
(SNIPS) is of lists without exploration, and of those of another bundle; it is refused where the log
says too little.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

FLAGS = flags.FlagValues()
_IMPRESSIONS = flags.DEFINE_string(
    "impressions", None, "Folder that the server writes to.", required=True, flag_values=FLAGS
)
_EVENTS = flags.DEFINE_string(
    "events", None, "File of the server's events.", required=True, flag_values=FLAGS
)
_OUT = flags.DEFINE_string(
    "out", "", "Parquet file for the rows; none by default.", flag_values=FLAGS
)
_KINDS = flags.DEFINE_list(
    "kinds", [], "Kinds of events that count as a success; all by default.", flag_values=FLAGS
)
_HOURS = flags.DEFINE_float(
    "hours",
    24.0,
    "Hours after an impression in which an event that names no recommendation belongs to it.",
    lower_bound=0,
    flag_values=FLAGS,
)
_ALL_LISTS = flags.DEFINE_bool(
    "all_lists",
    False,
    "Whether lists of which nothing came are rows too: nobody may have looked at them.",
    flag_values=FLAGS,
)
_ESTIMATE = flags.DEFINE_bool(
    "estimate", False, "Whether to estimate what other policies would earn.", flag_values=FLAGS
)
_BUNDLE = flags.DEFINE_string(
    "bundle",
    "",
    "Bundle whose lists are estimated, of users alone: a folder, or models:/NAME@ALIAS of MLflow.",
    flag_values=FLAGS,
)


def main() -> None:
    import numpy as np
    import pyarrow.parquet as pq

    from twotower.core.files import atomic
    from twotower.evaluation import off_policy

    # No extra is needed: whoever learns from what was shown need not be able to serve.
    from twotower.serving.impressions import log, rows

    shown = log.read_impressions(_IMPRESSIONS.value)
    events = rows.read_events(_EVENTS.value)
    # Joined once: rows and estimates are of the same labels.
    labelled = rows.join_events(shown, events, kinds=_KINDS.value, seconds=3_600 * _HOURS.value)
    successes = np.count_nonzero(labelled["label"].to_numpy())
    print(
        f"{len(shown):,} impressions in {len(shown['recommendation_id'].unique()):,} lists, "
        f"{len(events):,} events: {successes:,} impressions had one."
    )
    if _OUT.value:
        made = rows.training_rows(labelled, all_lists=_ALL_LISTS.value)
        with atomic(Path(_OUT.value)) as path:
            pq.write_table(made, path)
        print(f"{_OUT.value}: {len(made):,} rows.")
    # A bundle is named for nothing else.
    if _ESTIMATE.value or _BUNDLE.value:
        estimates = off_policy.estimate_policies(labelled, _BUNDLE.value)
        print(off_policy.format_estimates(estimates))
