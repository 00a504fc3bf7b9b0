r"""Publishes the vectors of a run's bundle in Redis, where several processes read them.

    twotower publish --workdir=runs/quickstart --redis=redis://localhost:6379/0 \
        [--name=shop] [--ttl=86400]

Readers find the vectors that were current before until all of the new ones are there. See
`twotower.integrations.redis_store`.
"""

from __future__ import annotations

from absl import flags

from twotower import dry_run
from twotower.commands import launch, mlflow_flags

FLAGS = flags.FlagValues()
_RUN = mlflow_flags.define_run(FLAGS, "bundle")
_REDIS = flags.DEFINE_string(
    "redis", None, "redis://HOST:PORT/DATABASE.", required=True, flag_values=FLAGS
)
_NAME = flags.DEFINE_string("name", "twotower", "Name that the keys begin with.", flag_values=FLAGS)
# Without an end, a store would hold the vectors of every version there ever was.
_TTL = flags.DEFINE_integer(
    "ttl", 86_400, "Seconds that the vectors live.", lower_bound=1, flag_values=FLAGS
)
_DRY_RUN = dry_run.define(FLAGS)


def main() -> None:
    from twotower.integrations.embedding_history import vector_blocks
    from twotower.integrations.redis_store import RedisStore, bundle_version

    # Before the bundle is loaded: a missing extra or a wrong address ends it at once.
    store = RedisStore(_REDIS.value, name=_NAME.value)
    retriever = launch.load_exported(_RUN.folder())
    # A hash of the bundle: readers ask for the vectors that their own items go with.
    version = bundle_version(retriever)
    if _DRY_RUN.value:
        print(f"Would publish {retriever} as {_NAME.value}:{version}.")
        return
    counts = store.publish(version, vector_blocks(retriever), ttl=_TTL.value)
    vectors = f"{counts['user']:,} user and {counts['item']:,} item vectors"
    print(f"{_NAME.value}:{version}: {vectors}, for {_TTL.value:,} seconds.")
