"""Several processes under load: nothing that was accepted is lost, whatever changes or dies."""

import collections
import http.client
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.serving.conftest import thin
from tests.serving.test_process import Server
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.retriever import Retriever
from twotower.serving.events import EventLog

ADMIN = "a token for everything"


class Clients:
    """Threads that ask for lists, and send events and items, until they are told to stop."""

    def __init__(self, server, users, items_of):
        self.statuses = collections.Counter()
        self.versions = collections.Counter()
        self.mixed = []
        self.events = []
        self.items = []
        # Connections that ended with the process at their other end.
        self.lost = 0
        # Whoever holds it has no question under way.
        self.asking = threading.Lock()
        self._server = server
        self._users = users
        self._items_of = items_of
        self._stop = threading.Event()
        works = [self._ask, self._ask, self._send_events, self._put_items]
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()

    def _run(self, work):
        connection = None
        number = 0
        while not self._stop.is_set():
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
            try:
                work(connection, number)
                number += 1
                if number % 10 == 0:
                    # Any of the processes may take the next one.
                    connection.close()
                    connection = None
                # The processor is for the server.
                time.sleep(0.02)
            except (http.client.HTTPException, OSError):
                self.lost += 1
                connection.close()
                connection = None

    def _request(self, connection, method, path, body):
        headers = {"content-type": "application/json", "x-api-key": ADMIN}
        connection.request(method, path, json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        self.statuses[response.status] += 1
        return response.status, answer

    def _ask(self, connection, number):
        user = self._users[number % len(self._users)]
        body = {"user_id": user, "k": 20, "columns": []}
        with self.asking:
            status, answer = self._request(connection, "POST", "/v1/retrieve", body)
            if status != 200:
                return
            version = answer["model_version"]
            self.versions[version] += 1
        shown = {item["item_id"] for item in answer["items"]}
        made = {item for item in shown if item.startswith("made-")}
        if not shown - made <= self._items_of[version]:
            self.mixed.append(answer)

    def _send_events(self, connection, number):
        # The same again after a lost connection, whatever became of it.
        event = {"event_id": f"event-{number}", "user_id": "somebody", "item_id": f"made-{number}"}
        status, _ = self._request(connection, "POST", "/v1/events", {"events": [event]})
        if status == 200:
            self.events.append(event["event_id"])

    def _put_items(self, connection, number):
        status, _ = self._request(connection, "PUT", f"/v1/items/made-{number}", {"columns": {}})
        if status == 200:
            self.items.append(f"made-{number}")

    def wait_for(self, version):
        """Waits until a version has answered."""
        before = self.versions[version]
        while self.versions[version] < before + 5:
            time.sleep(0.01)

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def children_of(process):
    """The numbers of the processes that answer, by the names that spawn gives them."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [
        int(child)
        for child in children
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()
    ]


def read_metrics(server):
    """The counters of all processes by their names and labels."""
    lines = server.request("GET", "/metrics")[1].decode().splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in pairs}


def count_answers(server, version):
    """The lists of a version that its server says it has answered."""
    label = f'endpoint="retrieve",status="200",version="{version}"'
    return read_metrics(server)[f"twotower_requests_total{{{label}}}"]


def check_counts(clients, server, versions):
    """Waits until the server counts all answers: each process tells its own now and then."""
    end = time.monotonic() + 60
    for version in versions:
        while count_answers(server, version) < clients.versions[version]:
            assert server.process.poll() is None and time.monotonic() < end
            time.sleep(0.05)


def wait_for_processes(server, count):
    while read_metrics(server)["twotower_processes"] < count:
        assert server.process.poll() is None
        time.sleep(0.1)


def change_versions(clients, server, versions):
    """Swaps, rolls back and splits; returns the first item that the new version must have."""

    def admin(method, call, **body):
        status, answer = server.request(method, f"/v1/admin/{call}", body)
        assert status == 200, answer

    old, new = versions
    clients.wait_for(old)
    # Whatever is acknowledged from now on is in both.
    first = len(clients.items) + 1
    admin("POST", "load", bundle="thin")
    admin("POST", "swap", version="thin")
    clients.wait_for(new)
    admin("POST", "rollback")
    clients.wait_for(old)
    admin("PUT", "split", weights={old: 1, "thin": 1})
    admin("PUT", "shadow", version="thin")
    clients.wait_for(new)
    return first


def kill_the_writer(clients, server, versions):
    """Kills the process that makes the changes: the other one takes over, with all versions."""
    before = children_of(server.process.pid)
    with clients.asking:
        # What a process has not told yet goes with it.
        check_counts(clients, server, versions)
        # The first one is ready before the second one may join.
        os.kill(before[0], signal.SIGKILL)
    while before[0] in children_of(server.process.pid):
        time.sleep(0.01)
    events = len(clients.events)
    for version in versions:
        clients.wait_for(version)
    wait_for_processes(server, 2)
    assert len(clients.events) > events


@pytest.mark.slow
def test_nothing_is_lost_while_versions_change_and_a_process_dies(copied, tmp_path):
    thinned = tmp_path / "bundles" / "thin"
    shutil.copytree(copied, thinned)
    thin(thinned)
    bundles = [load_bundle(copied, load_towers=False), load_bundle(thinned, load_towers=False)]
    versions = [bundle.manifest["sha256"][:12] for bundle in bundles]
    items = [set(bundle.items["item_id"].to_pylist()) for bundle in bundles]
    flags = ["--processes=2", f"--bundles={tmp_path / 'bundles'}"]
    server = Server(copied, *flags, right="admin", token=ADMIN)
    wait_for_processes(server, 2)
    users = bundles[0].users["user_id"].to_pylist()
    clients = Clients(server, users, dict(zip(versions, items)))
    try:
        first = change_versions(clients, server, versions)
        # Nobody had to ask twice.
        assert set(clients.statuses) == {200} and not clients.lost
        kill_the_writer(clients, server, versions)
        with clients.asking:
            # The answers of the dead one are counted among them.
            check_counts(clients, server, versions)
        assert server.end(signal.SIGTERM) == 0
    finally:
        clients.stop()
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
    assert set(clients.statuses) == {200} and not clients.mixed
    kept = {event.event_id for event in EventLog(copied.parent / "bundle.events").read_new()}
    assert len(clients.events) > 20 and kept >= set(clients.events)
    for folder, since in [(copied, 0), (thinned, first)]:
        retriever = Retriever.load(folder, load_towers=False)
        made = clients.items[since:]
        assert made and all(map(retriever.has_item, made))
