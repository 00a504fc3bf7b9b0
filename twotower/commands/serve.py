r"""Answers requests for recommendations over HTTP, by a bundle.

    twotower serve --workdir=runs/quickstart

    twotower serve --bundle=shop_bundle --port=8080 --tokens=tokens.json --aliases=names.json

    twotower serve --bundle=models:/shop@champion

    twotower serve --bundle=old=exports/november --bundle=new=exports/december --bundles=exports

    twotower serve --bundle=shop_bundle --shard=0 --port=8100
    twotower serve --bundle=shop_bundle --shard_urls=http://127.0.0.1:8100,http://127.0.0.1:8101

    curl http://127.0.0.1:8000/v1/retrieve -H 'Content-Type: application/json' \
        -d '{"user_id": "42", "k": 10}'

The page at / shows what people get, and /v1/openapi.json describes the API. A run that was never
exported is exported first. SIGTERM and Ctrl-C end the server after it has answered what it
accepted. It needs the extra serve.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import flags, logging

from twotower.commands import launch, mlflow_flags

if TYPE_CHECKING:  # the extra serve may be missing
    from twotower.serving.answers import Fallback
    from twotower.serving.app import App
    from twotower.serving.processes.member import Member
    from twotower.serving.processes.supervisor import Start

FLAGS = flags.FlagValues()
_RUN = mlflow_flags.define_run(FLAGS, "bundle")
_BUNDLE = flags.DEFINE_multi_string(
    "bundle",
    None,
    "The folder of a bundle, in the place of --workdir, or models:/NAME@ALIAS of MLflow; or "
    "NAME=FOLDER. Given several times, all are loaded, and the first one answers until PUT "
    "/v1/admin/split or a swap says otherwise.",
    flag_values=FLAGS,
)
_BUNDLES = flags.DEFINE_string(
    "bundles",
    "",
    "Folder whose bundles POST /v1/admin/load may load by their names.",
    flag_values=FLAGS,
)
_FOLLOW = flags.DEFINE_bool(
    "follow",
    True,
    "Whether a new version of a bundle that is served, by an export or a compaction, takes its "
    "place when it has proved itself.",
    flag_values=FLAGS,
)
# Loopback, since a server without tokens answers anybody who reaches it.
_HOST = flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "Address to answer at; others than this machine reach it by 0.0.0.0 alone. Encryption is left "
    "to a proxy before it.",
    flag_values=FLAGS,
)
_PORT = flags.DEFINE_integer(
    "port", 8000, "Port to answer at; 0 finds a free one.", lower_bound=0, flag_values=FLAGS
)
_ALLOWED_HOSTS = flags.DEFINE_list(
    "allowed_hosts",
    [],
    "Names that requests may be sent to (their header Host) besides those of --host, such as that "
    "of a proxy on this machine; * for any. On other addresses than loopback any will do, unless "
    "some are given.",
    flag_values=FLAGS,
)
_TOKENS = flags.DEFINE_string(
    "tokens",
    "",
    'JSON file of tokens: {"read": TOKEN, "change": TOKEN, "admin": TOKEN}, or several each in a '
    "list. TWOTOWER_READ_TOKEN and so on do the same.",
    flag_values=FLAGS,
)
_ALIASES = flags.DEFINE_string(
    "aliases",
    "",
    'JSON file of the field names of your API: {"buyer_id": "user_id", ...}.',
    flag_values=FLAGS,
)
_EVENTS = flags.DEFINE_string(
    "events", "", "File that keeps events; by default beside the bundle.", flag_values=FLAGS
)
_QUEUE = flags.DEFINE_integer(
    "queue",
    100,
    "Requests that may wait at once; more are refused with 503 and Retry-After.",
    lower_bound=1,
    flag_values=FLAGS,
)
_BATCH_US = flags.DEFINE_integer(
    "batch_us",
    None,
    "Microseconds in which requests to /v1/retrieve are collected after the first one, so that "
    "more of them are answered together: for accelerators. A request that is alone waits so long. "
    "By default only those are answered together that wait at the same moment.",
    lower_bound=1,
    flag_values=FLAGS,
)
_RATE = flags.DEFINE_integer(
    "rate",
    None,
    "Requests a second of each token, and of all clients without one together; more are refused "
    "with 429 and Retry-After.",
    lower_bound=1,
    flag_values=FLAGS,
)
_LOG = flags.DEFINE_enum(
    "log",
    "text",
    ["text", "json"],
    "Form of the log. As JSON it also has a line on each request that fails, and on a share of the "
    "others, with nothing of a person in it.",
    flag_values=FLAGS,
)
_LOG_SHARE = flags.DEFINE_float(
    "log_share",
    0.0,
    "Share of the requests that --log=json has a line on, beside those that fail.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=FLAGS,
)
_REDIS = flags.DEFINE_string(
    "redis",
    "",
    "redis://HOST:PORT/DATABASE with vectors of users who are not in the bundle, as `twotower "
    "publish` writes them for it. While it is away they are answered as anybody unknown is.",
    flag_values=FLAGS,
)
_REDIS_NAME = flags.DEFINE_string(
    "redis_name", "twotower", "Name that the keys in Redis begin with.", flag_values=FLAGS
)
_PROCESSES = flags.DEFINE_integer(
    "processes",
    1,
    "Processes that answer, one for each core; each of them holds a copy of the towers.",
    lower_bound=1,
    flag_values=FLAGS,
)
_SECONDS = flags.DEFINE_float(
    "seconds",
    10.0,
    "Time in which a request must arrive, and its answer be taken.",
    lower_bound=0.1,
    flag_values=FLAGS,
)
_FALLBACK = flags.DEFINE_enum(
    "fallback",
    "popular",
    ["popular", "latest", "none"],
    "List of somebody of whom nothing is known.",
    flag_values=FLAGS,
)
_PLUGINS = flags.DEFINE_list(
    "plugins", [], "Modules or files that register re-rankers for --rerank.", flag_values=FLAGS
)
_RERANK = flags.DEFINE_string(
    "rerank",
    "",
    "Re-ranker of the model's lists, with options: 'mine:weight=2'. Where it fails or is late, "
    "a list goes out by its scores.",
    flag_values=FLAGS,
)
_RERANK_MS = flags.DEFINE_float(
    "rerank_ms",
    20.0,
    "Milliseconds that --rerank has for a list; others are answered meanwhile.",
    lower_bound=0.1,
    flag_values=FLAGS,
)
_IMPRESSIONS = flags.DEFINE_string(
    "impressions",
    "",
    "Folder for what is shown to whom, as Parquet of 10 GB at most; none by default. "
    "`twotower impressions` reads it.",
    flag_values=FLAGS,
)
_SHARD = flags.DEFINE_integer(
    "shard",
    None,
    "Number of the one shard of a divided bundle that this process holds, for routers alone; from "
    "0 on. See `twotower export --shards`.",
    lower_bound=0,
    flag_values=FLAGS,
)
_SHARD_URLS = flags.DEFINE_list(
    "shard_urls",
    [],
    "Addresses of the processes with --shard, http://HOST:PORT each, in the order of their "
    "numbers: this process answers by them, and holds no item vectors.",
    flag_values=FLAGS,
)
_SHARD_MS = flags.DEFINE_float(
    "shard_ms",
    200.0,
    "Milliseconds in which a shard must answer; without one that does not, the answer says so.",
    lower_bound=1.0,
    flag_values=FLAGS,
)


def main() -> None:
    launch.require_one(_RUN.workdir, _RUN.mlflow_experiment, _BUNDLE)
    _check_shard_flags()
    _check_buckets()
    from twotower.core.install import extra

    with extra("serve", "serve"):
        from twotower.serving import server
        from twotower.serving.limits import Limits
        from twotower.serving.lists.options import ListOptions
        from twotower.serving.processes.supervisor import Supervisor
    # First, so that a port in use is not met after a long load.
    bound = server.bind(_HOST.value, _PORT.value)
    if _BUNDLE.value is None:
        folder = bundle_of(_RUN.folder())
        folders = {folder.name: folder}
    else:
        folders = read_bundles(_BUNDLE.value or [])
    if _SHARD.value is not None:
        serve_shard(next(iter(folders.values())), _SHARD.value, bound)
        return
    # Plain values, which are sent to the child processes: each makes its own server of them.
    options: dict[str, Any] = {
        "folders": folders,
        "events": _EVENTS.value,
        "tokens": _TOKENS.value,
        "aliases": _ALIASES.value,
        "bundles": _BUNDLES.value,
        # Shards have the version that they were started with.
        "follow": _FOLLOW.value and not _SHARD_URLS.value,
        "limits": Limits(
            waiting=_QUEUE.value,
            seconds=_SECONDS.value,
            rate=_RATE.value,
            batch_us=_BATCH_US.value,
            hosts=tuple(_ALLOWED_HOSTS.value),
        ),
        "log_share": _LOG_SHARE.value if _LOG.value == "json" else None,
        "lists": ListOptions(
            cast("Fallback", _FALLBACK.value), _PLUGINS.value, _RERANK.value, _RERANK_MS.value
        ),
        "impressions": _IMPRESSIONS.value,
        "shard_urls": _SHARD_URLS.value,
        "shard_seconds": _SHARD_MS.value / 1_000,
    }
    redis = _REDIS.value, _REDIS_NAME.value
    app = None
    # In this process, where a mistake ends with its message; several load in their children.
    if _PROCESSES.value == 1:
        app = make_app(options, redis)
    served = ", ".join(map(str, folders.values()))
    url = open_for_connections(bound)
    print(f"Serving {served} at {url} (/v1/openapi.json describes the API).", flush=True)
    if app is not None:
        server.serve(app, bound)
        return
    # A function of the module with its arguments, as a process that is spawned imports what it
    # runs.
    child = functools.partial(run_child, options, redis, logging.get_verbosity())
    Supervisor(child, bound, _PROCESSES.value, _SECONDS.value).serve()


def _check_shard_flags() -> None:
    """Refuses flags that do not go with one shard, or with a router.

    Raises:
        ConfigError: There are such flags.
    """
    from twotower.core.errors import ConfigError

    role = ""
    apart = [
        ("--bundles", bool(_BUNDLES.value)),
        ("a second --bundle", len(_BUNDLE.value or []) > 1),
        ("--batch_us", _BATCH_US.value is not None),
    ]
    if _SHARD_URLS.value:
        role = "--shard_urls"
        apart.append(("--shard", _SHARD.value is not None))
    elif _SHARD.value is not None:
        role = "--shard"
        apart.append(("--processes", _PROCESSES.value > 1))
    # A re-ranker runs in a thread for each request, and a batch is one for all of them.
    if _BATCH_US.value is not None and _RERANK.value:
        raise ConfigError("--batch_us does not go with --rerank. Leave one of them out.")
    for flag, is_set in apart:
        # Each of them would be read past: a shard answers routers alone, and a router has the
        # shards of one bundle.
        if role and is_set:
            raise ConfigError(f"{role} does not go with {flag}. Leave one of them out.")


def _check_buckets() -> None:
    """Refuses a folder of bundles in a bucket, and says that a run in one is not followed.

    Raises:
        ConfigError: --bundles is an address.
    """
    from twotower.core.errors import ConfigError
    from twotower.core.remote.mirror import is_copy
    from twotower.core.remote.objects import is_remote

    if is_remote(_BUNDLES.value):
        raise ConfigError(
            f"--bundles={_BUNDLES.value}: bundles are loaded by name from a folder of this "
            "machine. Mount the bucket, or name each bundle by --bundle=NAME=ADDRESS."
        )
    workdir = _RUN.workdir.value
    if workdir is not None and _FOLLOW.value and is_copy(Path(workdir)):
        logging.warning(
            "New exports in the bucket of a run are not followed. Name its bundle in the place of "
            "--workdir: --bundle=ADDRESS/bundle."
        )


def serve_shard(folder: Path, number: int, bound: socket.socket) -> None:
    """Serves one shard of a bundle until a signal ends it.

    Args:
        folder: Folder of the bundle.
        number: Number of the shard.
        bound: Socket that is bound to the address.
    """
    from twotower.serving import server
    from twotower.serving.limits import Limits
    from twotower.serving.shards.app import make_shard_app

    # Users may have seen many items, and routers are trusted.
    limits = Limits(body=1 << 26, waiting=_QUEUE.value, seconds=_SECONDS.value)
    app = make_shard_app(folder, number, host=_HOST.value, limits=limits, environment=os.environ)
    url = open_for_connections(bound)
    print(f"Serving shard {number} of {folder} at {url} for routers.", flush=True)
    server.serve(app, bound)


def open_for_connections(bound: socket.socket) -> str:
    """Opens a socket for connections, and returns its URL, which may be told then."""
    from twotower.serving import server

    # Before it is said: whoever reads the line may connect at once.
    bound.listen(server.BACKLOG)
    host, port = bound.getsockname()[:2]
    # An address of IPv6 stands in brackets in a URL.
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def bundle_of(workdir: Path) -> Path:
    """Returns the folder of the bundle of a run, which is exported now where it never was.

    Args:
        workdir: Folder of the run.
    """
    from twotower.plugins import load_config
    from twotower.retrieval.bundle import BUNDLE

    load_config(workdir)  # says what to do where the folder is no run
    folder = workdir / BUNDLE
    if not folder.exists():
        from twotower import api

        print(f"{folder} is not there yet: exporting it.", flush=True)
        # By the options of the run: whoever wants others exports it first.
        api.export(api.load_run(workdir))
    return folder


def make_app(
    options: Mapping[str, Any], redis: tuple[str, str], member: Member | None = None
) -> App:
    """Loads the bundles, and returns their server.

    Args:
        options: Arguments of `twotower.serving.server.make_app`, with URLs of shards in the place
            of `router`, which each process has of its own.
        redis: URL of a Redis and name of its keys; "" for none.
        member: This process among several.
    """
    from twotower.runtime import run_programs_in_place
    from twotower.serving import server

    run_programs_in_place()
    find = None
    url, name = redis
    if url:
        # Only with the flag: the extra redis need not be installed.
        from twotower.integrations.redis_store import RedisStore

        # Made in each process: a connection must not be shared between them.
        find = RedisStore(url, name=name).user_vector
    # URLs become one router, with connections that no other process may share.
    rest = dict(options)
    urls = rest.pop("shard_urls", ())
    seconds = rest.pop("shard_seconds", 0.0)
    router = None
    if urls:
        from twotower.serving.shards.app import TOKEN
        from twotower.serving.shards.router import Router

        router = Router(urls, seconds=seconds, token=os.environ.get(TOKEN, ""))
    return server.make_app(**rest, find_vector=find, member=member, router=router)


def run_child(
    options: Mapping[str, Any], redis: tuple[str, str], verbosity: int, start: Start
) -> None:
    """Answers requests as one of several processes.

    Args:
        options: Arguments of `twotower.serving.server.make_app`.
        redis: URL of a Redis and name of its keys; "" for none.
        verbosity: Verbosity of the log.
        start: What the parent gives to this process.
    """
    from twotower.serving import server
    from twotower.serving.processes.member import Member

    def serve() -> None:
        member = Member(
            start.folder, start.number, start.processes, start.parent, is_early=start.is_early
        )
        server.serve(make_app(options, redis, member), start.bound)

    launch.call_in_child(serve, verbosity)


def read_bundles(values: Sequence[str]) -> dict[str, Path]:
    """Returns the folders of --bundle by their names, which are those of the folders by default.

    Raises:
        ConfigError: Two have one name.
    """
    from twotower.core.errors import ConfigError

    folders: dict[str, Path] = {}
    for value in values:
        name, is_named, folder = value.partition("=")
        # A folder's own name may have the sign too.
        if not is_named or "/" in name or Path(value).is_dir():
            folder = value
            # Absolute, or "." would have no name.
            name = Path(value).absolute().name
        if name in folders:
            raise ConfigError(
                f"--bundle={value}: {name!r} names another bundle already. Write "
                f"--bundle=NAME={folder}."
            )
        folders[name] = Path(folder)
    return folders
