"""The cost of HTTP: the server's processor time for a request, and what it does beyond its limits.

    python -m experiments.benchmarks.serving [--bundle=FOLDER] [--quick] [--check] [--peer]
    python -m experiments.benchmarks.serving --batched [--bundle=FOLDER]
    python -m experiments.benchmarks.serving --requests=1000000 [--bundle=FOLDER]

Servers of one process on one core (the last one), asked from the others by wrk and hey (Debian's
packages): ids and scores, for known users and for histories of twenty items that the request
brings. The bundle is that of `experiments.benchmarks.bundle`, 200,000 items of width 64. Beside
ours run the servers of `experiments.benchmarks.echo_servers`, which read bodies and write answers
of the same size and do nothing else, and our server without the model, whose lists are kept: what
of it is HTTP, without what a call costs that finds the caches of the processor cold. --peer adds
the same retriever behind FastAPI, in an environment of its own, and --batched our server with
--batch_us. All take turns of a few seconds, the calls in this process too, so that other work on
the machine meets all alike; figures are medians over the turns.

The HTTP part is the processor time of our server without the model for a request. Promised are 60
us of a core on which a bare application of ASGI takes 40: at most 1.5 times the bare one's.

Requests a second at saturation are bounded by both parts: 10^6 / (60 + microseconds in process), of
which .8 are promised. Requests that wait at the same moment are answered together, which takes less
than as many calls in process, so that more than that bound may be answered.

At 1,000 requests a second the 99th percentile of the latency is told three times: of hey's ten and
five connections, which send in the same moment, so that the last one waits for all others, and of
wrk's hundred, which send at random moments.

With --requests it only tells the memory of the server as it answers so many requests of all kinds,
of users known and new, some of them spoilt.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging

from experiments.benchmarks import bundle, floors, harness
from experiments.benchmarks.environments import python_with

_BUNDLE = flags.DEFINE_string("bundle", "", "Folder of the bundles, made where they are missing.")
_PEER = flags.DEFINE_bool("peer", False, "Also serve by FastAPI.")
_BATCHED = flags.DEFINE_bool("batched", False, "Also serve with --batch_us=200.")
_REQUESTS = flags.DEFINE_integer("requests", 0, "Requests of a run that looks at memory alone.")
ITEMS = 200_000
BODIES = 20_000  # as many users: what was read for one is seldom there for the next
CALLS = 1_000  # in this process, in a turn
HISTORY = 20
CONNECTIONS = 32
BEYOND = 400  # connections past saturation
HTTP_MICROSECONDS = 60
HTTP_RATIO = 1.5  # of the HTTP part to the time of the bare server
P99_MS = 3.0  # at 1,000 requests a second
KINDS = ("a known user", "a history", "a history, k=50")
OURS = "twotower"
BARE = "bare ASGI"
# Name of a server that does nothing but HTTP -> its kind.
KEPT = "twotower, lists kept"
ECHOES = {BARE: "bare", "Starlette, msgspec": "starlette", KEPT: "kept"}
TICKS = os.sysconf("SC_CLK_TCK")
# Least shares: of the ceiling that both parts leave, and of what is promised of the HTTP part and
# of the latency.
FLOORS = {
    "a known user, of the ceiling": 0.8,
    "a history, of the ceiling": 0.8,
    "a history, k=50, of the ceiling": 0.8,
    "a known user, 1.5 bare / HTTP part": 1.0,
    "a history, 1.5 bare / HTTP part": 1.0,
    "a history, k=50, 1.5 bare / HTTP part": 1.0,
    "a known user, 3 ms / p99 at random moments": 1.0,
}
# Posts the lines of a file in turn, and counts the statuses of the answers.
SCRIPT = """
local bodies = {}
for line in io.lines("FILE") do bodies[#bodies + 1] = line end
local headers = {["Content-Type"] = "application/json"}
local n = FIRST
local threads = {}
new = 0
ok = 0
shed = 0
other = 0
function setup(thread) table.insert(threads, thread) end
function request()
  n = n % #bodies + 1
  local path, body = bodies[n]:match("^(/%S+) (.*)$")
  if path == nil then return wrk.format("POST", "/v1/retrieve", headers, bodies[n]) end
  -- Somebody who has never been here.
  new = new + 1
  return wrk.format("POST", path, headers, (body:gsub("@", SALT .. "-" .. new)))
end
function response(status)
  if status == 200 then ok = ok + 1
  elseif status == 503 or status == 429 then shed = shed + 1
  else other = other + 1 end
end
function done(summary, latency)
  local counts = {0, 0, 0}
  for _, thread in ipairs(threads) do
    counts[1] = counts[1] + thread:get("ok")
    counts[2] = counts[2] + thread:get("shed")
    counts[3] = counts[3] + thread:get("other")
  end
  print(string.format("counted %d %d %d %f %f", counts[1], counts[2], counts[3],
    summary.duration / 1e6, latency.max / 1e3))
end
"""
# Waits between two requests of a connection, in milliseconds, so that all make 1,000 a second.
RANDOM = """
math.randomseed(1)
function delay() return math.floor(-EACH * math.log(1 - math.random()) + 0.5) end
"""
RANDOM_CONNECTIONS = 100
# The same answer as ours, as most people would write it.
FASTAPI = """
import sys
from fastapi import FastAPI
from pydantic import BaseModel
import uvicorn
from twotower.retrieval.retriever import Retriever
retriever = Retriever.load(sys.argv[1])
retriever.warm()
class Request(BaseModel):
    user_id: str | None = None
    history: list[str] | None = None
    k: int = 10
    columns: list[str] | None = None
class Item(BaseModel):
    item_id: str
    score: float
class Answer(BaseModel):
    items: list[Item]
app = FastAPI()
@app.get("/readyz")
async def ready():
    return {"status": "ok"}
@app.post("/v1/retrieve")
async def retrieve(request: Request) -> Answer:
    if request.history:
        row = {"history": request.history}
        events = None if request.user_id is None else ()
        asked = {"rows": [row], "events": events}
        found = retriever.recommend(request.user_id, k=request.k, columns=(), **asked)
    else:
        found = retriever.recommend(request.user_id, k=request.k, columns=())
    return Answer(items=[Item(item_id=x.item_id, score=x.score) for x in found])
uvicorn.run(app, port=int(sys.argv[2]), log_level="error", access_log=False)
"""


def run_elsewhere(command: Sequence[str]) -> str:
    """Returns what a command prints that runs on the cores that no server has."""
    cores = sorted(os.sched_getaffinity(0))
    others = ",".join(map(str, cores[:-1] or cores))
    pinned = ["taskset", "-c", others, *command]
    return subprocess.run(pinned, capture_output=True, text=True, check=True).stdout


class Load(NamedTuple):
    """What wrk measured.

    Attributes:
        ok: Answers.
        shed: Requests that were refused for want of time.
        other: Any other status.
        seconds: Time of the clock.
        slowest: Longest latency of all of them, in milliseconds.
        microseconds: Processor time of the server for each request.
    """

    ok: int
    shed: int
    other: int
    seconds: float
    slowest: float
    microseconds: float


class Server:
    """A server in a process of its own, on the last core.

    Attributes:
        port: Its port on loopback.
    """

    def __init__(self, command: list[str], port: int, environment: Mapping[str, str] = os.environ):
        self.port = port
        core = max(os.sched_getaffinity(0))
        # Of its processor's threads each would spin beside the others.
        pinned = ["taskset", "-c", str(core), *command]
        self._process = subprocess.Popen(pinned, stdout=subprocess.DEVNULL, env=dict(environment))
        address = f"http://127.0.0.1:{port}/readyz"
        for _ in range(600):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(address).status == 200:
                    return
            time.sleep(0.2)
        sys.exit("The server does not become ready.")

    def processor_seconds(self) -> float:
        """Returns the processor time that it has taken, in user code and in the system."""
        # taskset becomes the server.
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self) -> tuple[float, float]:
        """Returns its resident and its anonymous memory in MiB.

        The second is what it has allocated: pages of mapped files come and go with other work.
        """
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        kinds = ("VmRSS", "RssAnon")
        resident, anonymous = (
            int(re.findall(rf"^{kind}:\s+(\d+) kB", text, re.MULTILINE)[0]) / 1_024
            for kind in kinds
        )
        return resident, anonymous

    def close(self) -> None:
        """Ends the process."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def make_bodies(loaded: Any, folder: Path) -> dict[str, Path]:
    """Writes the bodies of requests, one a line, and returns their files by kind."""
    rng = np.random.default_rng(1)
    users = loaded.users["user_id"].to_pylist()
    items = loaded.items["item_id"].to_pylist()
    chances = np.maximum(loaded.counts, 1) / np.maximum(loaded.counts, 1).sum()
    files = {}
    for kind in KINDS:
        histories = rng.choice(len(items), (BODIES, HISTORY), p=chances).tolist()
        lines = []
        for history in histories:
            body: dict[str, Any] = {"k": 10, "columns": []}
            if kind != "a history":
                body["user_id"] = users[rng.integers(len(users))]
            if kind != "a known user":
                body["history"] = [items[item] for item in history]
            if kind == "a history, k=50":
                body["k"] = 50
            lines.append(json.dumps(body))
        files[kind] = folder / f"{kind.replace(' ', '_')}.txt"
        files[kind].write_text("\n".join(lines) + "\n")
    return files


def in_process(retriever: Any, bodies: list[dict[str, Any]], turn: int) -> float:
    """Returns the processor time of calls in this process, in microseconds each.

    Args:
        retriever: Retriever of the bundle.
        bodies: Bodies of the requests.
        turn: Number of the turn: each one takes other bodies.
    """
    first = turn * CALLS % len(bodies)
    chosen = bodies[first : first + CALLS]
    start = time.process_time()
    for body in chosen:
        if "history" in body:
            # As the server asks: what is stored of a known user stands beside the history.
            events = () if "user_id" in body else None
            row = {"history": body["history"]}
            user = body.get("user_id")
            retriever.recommend(user, rows=[row], events=events, k=body["k"], columns=())
        else:
            retriever.recommend(body["user_id"], k=body["k"], columns=())
    return 1e6 * (time.process_time() - start) / len(chosen)


def make_mixed(loaded: Any, folder: Path) -> Path:
    """Writes requests of all kinds, a path and a body a line, "@" in the place of a new id."""
    rng = np.random.default_rng(2)
    users = loaded.users["user_id"].to_pylist()
    items = loaded.items["item_id"].to_pylist()

    def some(count: int) -> list[str]:
        return [items[row] for row in rng.integers(len(items), size=count).tolist()]

    def somebody() -> str:
        return users[rng.integers(len(users))]

    new = {"user_id": "new-@"}
    # (share, path, function that makes a body)
    kinds: list[tuple[float, str, Callable[[], dict[str, Any]]]] = [
        (0.74, "retrieve", lambda: {"user_id": somebody(), "columns": []}),
        (0.05, "retrieve", lambda: {"user_id": somebody(), "k": int(rng.integers(1, 60))}),
        (0.05, "retrieve", lambda: {"history": some(int(rng.integers(1, 40))), "columns": []}),
        (0.02, "retrieve", lambda: {**new, "features": {"gender": "f"}}),
        (0.03, "retrieve", lambda: {"user_id": somebody(), "history": some(20), "deny": some(5)}),
        (0.01, "similar_items", lambda: {"item_id": some(1)[0]}),
        (0.01, "popular", lambda: {"k": 20, "deny": ["new-@"]}),
        (0.01, "encode_user", lambda: {**new, "history": some(3)}),
        (0.01, "match", lambda: {"pairs": [{"user_id": somebody(), "item_id": some(1)[0]}]}),
        (0.01, "retrieve/batch", lambda: {"requests": [{"user_id": somebody()}, new]}),
        # No field of a request, and no item.
        (0.04, "retrieve", lambda: {"user_id": somebody(), "kk": 3}),
        (0.02, "similar_items", lambda: {"item_id": "new-@"}),
    ]
    lines = []
    for kind in rng.choice(len(kinds), BODIES, p=[share for share, _, _ in kinds]).tolist():
        _, path, make = kinds[kind]
        lines.append(f"/v1/{path} {json.dumps(make())}")
    file = folder / "mixed.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def watch_memory(server: Server, file: Path, requests: int) -> None:
    """Prints the memory of a server before, amid and after so many requests."""
    answered = 0
    part = 0
    marks = [0, requests // 10, requests // 4, requests // 2, requests * 3 // 4, requests]
    counts: dict[str, int] = collections.Counter()
    while marks:
        if answered >= marks[0]:
            mark = marks.pop(0)
            resident, anonymous = server.memory()
            shown = f"{resident:.1f} MiB, {anonymous:.1f} of them anonymous"
            print(f"{answered:>10,} requests (from {mark:,}): {shown}", flush=True)
            continue
        load = ask(server, file, connections=CONNECTIONS, seconds=10, first=part % BODIES)
        # Another first body and other new users each time.
        part += 1_009
        answered += load.ok + load.shed + load.other
        counts.update(ok=load.ok, shed=load.shed, refused=load.other)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))


def ask(server: Server, bodies: Path, *, connections: int, seconds: int, first: int = 0) -> Load:
    """Asks a server as fast as it answers, by wrk, from the body of a number on."""
    script = bodies.with_suffix(".lua")
    text = SCRIPT.replace("FILE", str(bodies)).replace("FIRST", str(first))
    script.write_text(text.replace("SALT", str(first)))
    before = server.processor_seconds()
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"-s{script}", "--latency"]
    command.append(f"http://127.0.0.1:{server.port}")
    printed = run_elsewhere(command)
    spent = server.processor_seconds() - before
    (counted,) = re.findall(r"counted (.*)", printed)
    ok, shed, other, duration, slowest = map(float, counted.split())
    requests = ok + shed + other
    microseconds = 1e6 * spent / max(requests, 1)
    return Load(int(ok), int(shed), int(other), duration, slowest, microseconds)


def ask_steadily(server: Server, body: str, *, connections: int, seconds: int) -> float:
    """Returns the 99th percentile of the latency at 1,000 requests a second, in milliseconds.

    All connections send in the same moments.
    """
    command = ["hey", "-z", f"{seconds}s", "-c", str(connections), "-q", str(1_000 // connections)]
    command += ["-m", "POST", "-d", body, "-T", "application/json"]
    printed = run_elsewhere([*command, f"http://127.0.0.1:{server.port}/v1/retrieve"])
    # Of fewer than a hundred answers, on a machine that is busy with other work, hey tells none.
    found = re.search(r"99%+ in ([\d.]+) secs", printed) or re.search(
        r"Slowest:\s*([\d.]+)", printed
    )
    assert found is not None, printed
    return 1e3 * float(found[1])


def ask_at_random(server: Server, bodies: Path, *, seconds: int) -> float:
    """Returns what `ask_steadily` does, of connections that send at random moments."""
    script = bodies.with_suffix(".random.lua")
    text = SCRIPT.replace("FILE", str(bodies)).replace("FIRST", "0").replace("SALT", "0")
    script.write_text(text + RANDOM.replace("EACH", str(RANDOM_CONNECTIONS)))
    command = ["wrk", "-t1", f"-c{RANDOM_CONNECTIONS}", f"-d{seconds}s", f"-s{script}", "--latency"]
    printed = run_elsewhere([*command, f"http://127.0.0.1:{server.port}"])
    found = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    assert found is not None, printed
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]


@contextlib.contextmanager
def running(
    command: Callable[[int], list[str]], environment: Mapping[str, str] = os.environ
) -> Iterator[Server]:
    """Runs a server on a free port."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(command(port), port, environment)
    try:
        yield server
    finally:
        server.close()


def measure(
    servers: Mapping[str, Server], files: Mapping[str, Path], retriever: Any
) -> dict[str, dict[str, float]]:
    """Returns the figures of each server and kind of request, in turns."""
    turns = 3 if harness.QUICK.value else 7
    seconds = 1 if harness.QUICK.value else 2
    bodies = {kind: path.read_text().splitlines() for kind, path in files.items()}
    inside: dict[str, list[float]] = {kind: [] for kind in files}
    loads: dict[tuple[str, str], list[Load]] = collections.defaultdict(list)
    waits: dict[tuple[str, str], list[list[float]]] = collections.defaultdict(list)
    for turn in range(turns + 1):
        for kind, path in files.items():
            asked = [json.loads(line) for line in bodies[kind]]
            with on_last_core():
                inside[kind].append(in_process(retriever, asked, turn))
            first = turn * BODIES // (turns + 1)
            for name, server in servers.items():
                load = ask(server, path, connections=CONNECTIONS, seconds=seconds, first=first)
                loads[name, kind].append(load)
                body = bodies[kind][first]
                waits[name, kind].append(
                    [
                        ask_steadily(server, body, connections=10, seconds=1),
                        ask_steadily(server, body, connections=5, seconds=1),
                        ask_at_random(server, path, seconds=1),
                    ]
                )
    figures = {}
    for name in servers:
        for kind in files:
            # The first turn fills caches.
            alone = statistics.median(inside[kind][1:])
            each = loads[name, kind][1:]
            cost = statistics.median(load.microseconds for load in each)
            rate = statistics.median(load.ok / load.seconds for load in each)
            is_ours = name not in ECHOES
            bare = statistics.median(x.microseconds for x in loads[BARE, kind][1:])
            ten, five, random = (statistics.median(x) for x in zip(*waits[name, kind][1:]))
            figures[f"{name}, {kind}"] = {
                "in process us": alone if is_ours else 0.0,
                "server us": cost,
                "server / bare": cost / bare,
                "requests/s": rate,
                "of the ceiling": rate * (HTTP_MICROSECONDS + alone) / 1e6 if is_ours else 0.0,
                "p99 ms at 1,000/s, ten": ten,
                "five": five,
                "random": random,
                "other statuses": sum(load.other for load in each),
            }
    return figures


@contextlib.contextmanager
def on_last_core() -> Iterator[None]:
    """Keeps this process on the core of the servers."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def commands(folder: Path, temporary: Path) -> dict[str, Callable[[int], list[str]]]:
    """Returns the command of each server by its name, a function of the port."""

    def ours(port: int) -> list[str]:
        return [sys.executable, "-m", "twotower", "serve", f"--bundle={folder}", f"--port={port}"]

    def echo(kind: str, port: int) -> list[str]:
        command = [sys.executable, "-m", "experiments.benchmarks.echo_servers", kind, str(port)]
        return [*command, str(folder)] if kind == "kept" else command

    found: dict[str, Callable[[int], list[str]]] = {OURS: ours}
    if _BATCHED.value:
        # With events of its own: one server alone writes a file of them.
        apart = ["--batch_us=200", f"--events={temporary / 'batched.events'}"]
        found[f"{OURS} --batch_us=200"] = lambda port: [*ours(port), *apart]
    for name, kind in ECHOES.items():
        found[name] = functools.partial(echo, kind)
    if _PEER.value:
        path = temporary / "peer.py"
        path.write_text(FASTAPI)
        python = python_with("fastapi")
        if python is None:
            sys.exit("FastAPI cannot be installed.")
        found["FastAPI"] = lambda port: [python, str(path), str(folder), str(port)]
    return found


def print_figures(figures: Mapping[str, Mapping[str, float]]) -> None:
    """Prints a row of each server and kind."""
    (first, *_) = figures.values()
    print(", ".join(first))
    for name, row in figures.items():
        shown = "".join(f"{value:10.2f}" for value in row.values())
        print(f"{name:32}{shown}", flush=True)


def past_saturation(server: Server, bodies: Path, name: str) -> dict[str, float]:
    """Prints and returns what becomes of more requests than can be answered."""
    before = count_seconds(server)
    load = ask(server, bodies, connections=BEYOND, seconds=5)
    after = count_seconds(server)
    print(
        f"past saturation, {BEYOND} connections, {name}: {load.ok / load.seconds:,.0f}/s answered, "
        f"{load.shed / load.seconds:,.0f}/s refused, {load.other} others, "
        f"slowest {load.slowest:.1f} ms"
    )
    figures = load._asdict()
    if after:
        # Of those that were answered, from their arrival in the server to their answer.
        counts = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
        total = counts[float("inf")]
        figures["p99 seconds in the server"] = min(
            bound for bound, count in counts.items() if count >= 0.99 * total
        )
        figures["most seconds in the server"] = min(
            bound for bound, count in counts.items() if count >= total
        )
        shown = [figures[f"{name} seconds in the server"] for name in ("p99", "most")]
        print(f"  in the server at most {shown[0]:g} s (99 %), {shown[1]:g} s (all)")
    return figures


def count_seconds(server: Server) -> dict[float, float]:
    """Returns the number of answered lists by the bound of their time; none of another server."""
    try:
        address = f"http://127.0.0.1:{server.port}/metrics"
        text = urllib.request.urlopen(address).read().decode()
    except urllib.error.HTTPError:
        return {}
    bucket = (
        r'twotower_request_seconds_bucket\{endpoint="retrieve",le="([^"]+)",version="\w+"\} (\S+)'
    )
    return {float(bound): float(count) for bound, count in re.findall(bucket, text)}


def main(argv: list[str]) -> None:
    from twotower.retrieval.retriever import Retriever
    from twotower.runtime import run_programs_in_place

    logging.set_verbosity(logging.ERROR)
    items = ITEMS // 10 if harness.QUICK.value else ITEMS
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        kept = Path(_BUNDLE.value or temporary) / f"items-{items}"
        if not (kept / "manifest.json").exists():
            bundle.make(kept, items)
        folder = Path(temporary) / "copy"
        shutil.copytree(kept, folder)
        # As the server does.
        run_programs_in_place()
        with on_last_core():
            retriever = Retriever.load(folder)
            retriever.warm()
        files = make_bodies(retriever.bundle, Path(temporary))
        # Environments of their own have FastAPI alone; all else is that of this process.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        if _REQUESTS.value:
            ours = commands(folder, Path(temporary))[OURS]
            server = stack.enter_context(running(ours, environment))
            file = make_mixed(retriever.bundle, Path(temporary))
            watch_memory(server, file, _REQUESTS.value)
            return
        servers = {
            name: stack.enter_context(running(command, environment))
            for name, command in commands(folder, Path(temporary)).items()
        }
        print(f"{items:,} items")
        figures: dict[str, Any] = measure(servers, files, retriever)
        print_figures(figures)
        for name in (OURS, BARE):
            figures[f"past saturation, {name}"] = past_saturation(
                servers[name], files["a history"], name
            )
    harness.write_json("serving", figures, unit="us", base=f"{BARE}, a known user")
    shares = {}
    for kind in KINDS:
        row = figures[f"{OURS}, {kind}"]
        http = figures[f"{KEPT}, {kind}"]["server / bare"]
        shares[f"{kind}, of the ceiling"] = row["of the ceiling"]
        shares[f"{kind}, 1.5 bare / HTTP part"] = HTTP_RATIO / http
        shares[f"{kind}, 3 ms / p99 at random moments"] = P99_MS / row["random"]
    floors.check(shares, FLOORS)


if __name__ == "__main__":
    app.run(main)
