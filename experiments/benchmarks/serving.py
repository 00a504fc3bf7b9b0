"""The cost of HTTP: the server's processor time for a request, and what it does beyond its limits.

    python -m experiments.benchmarks.serving [--bundle=FOLDER] [--quick] [--check] [--peer]

A server of one process on one core (the last one), asked from the others by wrk and hey (Debian's
packages): ids and scores of ten items, for known users and for histories of twenty items that the
request brings. The bundle is that of `experiments.benchmarks.bundle`, 200,000 items of width 64.

The HTTP part is the processor time of the server for a request beyond that of the same call in this
process, on the same core: at most 60 us are promised. Requests a second at saturation are bounded
by both: 10^6 / (60 + microseconds in process), of which .8 are promised. At 1,000 requests a second
hey tells the 99th percentile of the latency, and past saturation wrk tells what is refused and how
long the slowest wait. --peer adds the same retriever behind FastAPI, in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging

from experiments.benchmarks import bundle, floors, harness
from experiments.benchmarks.environments import python_with

_BUNDLE = flags.DEFINE_string("bundle", "", "Folder of the bundles, made where they are missing.")
_PEER = flags.DEFINE_bool("peer", False, "Also serve by FastAPI.")
ITEMS = 200_000
BODIES = 500
HISTORY = 20
CONNECTIONS = 32
BEYOND = 400  # connections past saturation
HTTP_MICROSECONDS = 60
TICKS = os.sysconf("SC_CLK_TCK")
# Least shares; of the ceiling that both parts leave, and of the promised time of the HTTP part.
FLOORS = {
    "a known user, of the ceiling": 0.8,
    "a history, of the ceiling": 0.8,
    "a known user, 60 us / HTTP part": 1.0,
    "a history, 60 us / HTTP part": 1.0,
}
# Posts the lines of a file in turn, and counts the statuses of the answers.
SCRIPT = """
local bodies = {}
for line in io.lines("FILE") do bodies[#bodies + 1] = line end
local headers = {["Content-Type"] = "application/json"}
local n = 0
local threads = {}
ok = 0
shed = 0
other = 0
function setup(thread) table.insert(threads, thread) end
function request()
  n = n % #bodies + 1
  return wrk.format("POST", "/v1/retrieve", headers, bodies[n])
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
        found = retriever.recommend(rows=[{"history": request.history}], k=request.k)
    else:
        found = retriever.recommend(request.user_id, k=request.k)
    return Answer(items=[Item(item_id=x.item_id, score=x.score) for x in found])
uvicorn.run(app, port=int(sys.argv[2]), log_level="error", access_log=False)
"""


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
    for kind in ("a known user", "a history"):
        lines = []
        for _ in range(BODIES):
            body: dict[str, Any] = {"k": 10, "columns": []}
            if kind == "a known user":
                body["user_id"] = users[rng.integers(len(users))]
            else:
                drawn = rng.choice(len(items), HISTORY, p=chances)
                body["history"] = [items[item] for item in drawn.tolist()]
            lines.append(json.dumps(body))
        files[kind] = folder / f"{kind.replace(' ', '_')}.txt"
        files[kind].write_text("\n".join(lines) + "\n")
    return files


def in_process(retriever: Any, path: Path) -> float:
    """Returns the processor time of the same calls in this process, in microseconds each."""
    bodies = [json.loads(line) for line in path.read_text().splitlines()]

    def call(body: dict[str, Any]) -> None:
        if "history" in body:
            retriever.recommend(rows=[{"history": body["history"]}], k=10)
        else:
            retriever.recommend(body["user_id"], k=10)

    for body in bodies:
        call(body)
    times = []
    for _ in range(5 if harness.QUICK.value else 20):
        start = time.process_time()
        for body in bodies:
            call(body)
        times.append((time.process_time() - start) / len(bodies))
    return 1e6 * float(np.median(times))


def ask(server: Server, bodies: Path, *, connections: int, seconds: int) -> Load:
    """Asks a server as fast as it answers, by wrk."""
    script = bodies.with_suffix(".lua")
    script.write_text(SCRIPT.replace("FILE", str(bodies)))
    before = server.processor_seconds()
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"-s{script}", "--latency"]
    command.append(f"http://127.0.0.1:{server.port}")
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spent = server.processor_seconds() - before
    (counted,) = re.findall(r"counted (.*)", printed)
    ok, shed, other, duration, slowest = map(float, counted.split())
    requests = ok + shed + other
    return Load(int(ok), int(shed), int(other), duration, slowest, 1e6 * spent / requests)


def ask_steadily(server: Server, bodies: Path, *, seconds: int) -> float:
    """Returns the 99th percentile of the latency at 1,000 requests a second, in milliseconds."""
    body = bodies.read_text().splitlines()[0]
    command = ["hey", "-z", f"{seconds}s", "-c", "10", "-q", "100", "-m", "POST", "-d", body]
    command += ["-T", "application/json", f"http://127.0.0.1:{server.port}/v1/retrieve"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (p99,) = re.findall(r"99%% in ([\d.]+) secs|99% in ([\d.]+) secs", printed)
    return 1e3 * float(p99[0] or p99[1])


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


def measure(server: Server, files: dict[str, Path], inside: dict[str, float], name: str) -> Any:
    """Prints and returns the figures of a server, by kind of request."""
    seconds = 3 if harness.QUICK.value else 10
    figures = {}
    for kind, path in files.items():
        # The first requests fill caches and the branch predictor.
        ask(server, path, connections=CONNECTIONS, seconds=1)
        load = ask(server, path, connections=CONNECTIONS, seconds=seconds)
        http = load.microseconds - inside[kind]
        rate = load.ok / load.seconds
        ceiling = 1e6 / (HTTP_MICROSECONDS + inside[kind])
        p99 = ask_steadily(server, path, seconds=seconds)
        figures[f"{name}, {kind}"] = {
            "in process us": inside[kind],
            "server us": load.microseconds,
            "HTTP us": http,
            "requests/s": rate,
            "of the ceiling": rate / ceiling,
            "p99 ms at 1,000/s": p99,
            "other statuses": load.other,
        }
        shown = "".join(f"{value:12.2f}" for value in figures[f"{name}, {kind}"].values())
        print(f"{name + ', ' + kind:32}{shown}", flush=True)
    return figures


def main(argv: list[str]) -> None:
    from twotower.retrieval.retriever import Retriever

    logging.set_verbosity(logging.ERROR)
    items = ITEMS // 10 if harness.QUICK.value else ITEMS
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(_BUNDLE.value or temporary) / f"items-{items}"
        if not (kept / "manifest.json").exists():
            bundle.make(kept, items)
        folder = Path(temporary) / "copy"
        shutil.copytree(kept, folder)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        retriever = Retriever.load(folder)
        retriever.warm()
        files = make_bodies(retriever.bundle, Path(temporary))
        inside = {kind: in_process(retriever, path) for kind, path in files.items()}
        os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
        columns = "in process, server, HTTP (us), requests/s, of the ceiling, p99 (ms), other"
        print(f"{items:,} items: {columns}")

        def ours(port: int) -> list[str]:
            flags_of_server = [f"--bundle={folder}", f"--port={port}"]
            return [sys.executable, "-m", "twotower", "serve", *flags_of_server]

        with running(ours) as server:
            figures = measure(server, files, inside, "twotower")
            load = ask(server, files["a history"], connections=BEYOND, seconds=5)
        print(
            f"past saturation, {BEYOND} connections: {load.ok / load.seconds:,.0f}/s answered, "
            f"{load.shed / load.seconds:,.0f}/s refused, {load.other} others, "
            f"slowest {load.slowest:.1f} ms"
        )
        figures["past saturation"] = load._asdict()
        if _PEER.value:
            path = Path(temporary) / "peer.py"
            path.write_text(FASTAPI)
            python = python_with("fastapi")
            if python is None:
                sys.exit("FastAPI cannot be installed.")
            # Its own environment has FastAPI alone; all else is that of this process.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

            def theirs(port: int) -> list[str]:
                return [python, str(path), str(folder), str(port)]

            with running(theirs, environment) as peer:
                figures |= measure(peer, files, inside, "FastAPI")
    harness.write_json("serving", figures, unit="us", base="twotower, a known user")
    shares = {}
    for kind in files:
        row = figures[f"twotower, {kind}"]
        shares[f"{kind}, of the ceiling"] = row["of the ceiling"]
        shares[f"{kind}, 60 us / HTTP part"] = HTTP_MICROSECONDS / max(row["HTTP us"], 1.0)
    floors.check(shares, FLOORS)


if __name__ == "__main__":
    app.run(main)
