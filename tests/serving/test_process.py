"""A server as a process of its own, on loopback: its bounds and its end."""

import concurrent.futures
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from uvicorn.protocols.http import httptools_impl

from twotower.retrieval import retriever
from twotower.retrieval.bundle import load_bundle
from twotower.serving import server

ROOT = Path(__file__).parents[2]
TOKEN = "a token for changes"


class Server:
    """`twotower serve` on a free port."""

    def __init__(self, bundle, *flags, right="change", token=TOKEN):
        self.token = token
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            f"TWOTOWER_{right.upper()}_TOKEN": token,
        }
        command = [sys.executable, "-m", "twotower", "serve", f"--bundle={bundle}", "--port=0"]
        self.process = subprocess.Popen(
            [*command, *flags], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        (port,) = re.findall(r":(\d+) ", self.process.stdout.readline())
        self.port = int(port)
        while self.request("GET", "/readyz")[0] != 200:
            assert self.process.poll() is None
            time.sleep(0.05)

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"content-type": "application/json", "x-api-key": self.token}
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.headers["content-type"] != "text/plain; version=0.0.4; charset=utf-8":
            answer = json.loads(answer)
        connection.close()
        return response.status, answer

    def raw(self, *parts):
        """What comes back until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(0.05 * (len(parts) > 1))
            received = b""
            while True:
                part = connection.recv(65_536)
                if not part:
                    return received
                received += part

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


def check_bounds(server):
    """A head, or a body, that does not end, and a head that is too long, end the connection."""
    assert server.raw(b"GET /healthz HTTP/1.1\r\nx: a\r\n").startswith(b"HTTP/1.1 408")
    body = b"POST /v1/retrieve HTTP/1.1\r\ncontent-type: application/json\r\n"
    body += b"content-length: 10\r\n\r\n{"
    assert server.raw(body).startswith(b"HTTP/1.1 408")
    long = b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000
    assert server.raw(long).startswith(b"HTTP/1.1 431")
    assert server.raw(long + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    # A head within the bound, whose first part is longer than half of it.
    head = b"GET /healthz HTTP/1.1\r\nconnection: close\r\n" + b"x: 0123456789\r\n" * 800
    assert server.raw(head, b"\r\n").startswith(b"HTTP/1.1 200")
    # A page of another site whose name points here.
    other = b"GET /v1/info HTTP/1.1\r\nhost: site.example:%d\r\n\r\n" % server.port
    assert server.raw(other).startswith(b"HTTP/1.1 421")
    assert server.raw(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    # As Java's client asks: its offer of another protocol must not cost the body.
    head = b"POST /v1/popular HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 7\r\n"
    for other in (b"h2c", b"websocket", b"x/1, TLS/1.0"):
        offer = head + b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: " + other
        assert server.raw(offer + b'\r\n\r\n{"k":1}').startswith(b"HTTP/1.1 200")
    # One in two pieces is refused in words, and so is a tunnel.
    refused = server.raw(offer.removesuffix(b"grade: " + other), b"grade: a\r\n\r\n{}")
    assert refused.startswith(b"HTTP/1.1 501") and b"without the header Upgrade" in refused
    assert server.raw(b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n").startswith(b"HTTP/1.1 4")
    # What stands behind a body is no header.
    chunked = b"POST /v1/popular HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n"
    chunked += b"\r\n2\r\n{}\r\n0\r\ncontent-type: application/json\r\n\r\n"
    assert server.raw(chunked).startswith(b"HTTP/1.1 415")


def check_overload(server):
    """More in one moment than may wait: some are answered, the others refused at once."""
    head = b"POST /v1/popular HTTP/1.1\r\ncontent-type: application/json\r\n"
    ask = head + b"content-length: 2\r\nconnection: close\r\n\r\n{}"
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.raw, [ask] * 100))
    statuses = {answer[9:12] for answer in answers}
    assert b"200" in statuses and statuses <= {b"200", b"503"}


def check_end(server, user):
    """Requests go on while it ends: what it takes it answers, and then it takes none."""

    def ask_on(_):
        answered = 0
        while True:
            try:
                status, _ = server.request("POST", "/v1/retrieve", {"user_id": user})
            # Refused, or dropped by the system with the connections that nobody had accepted.
            except (ConnectionRefusedError, ConnectionResetError):
                return answered
            assert status in (200, 503)
            answered += status == 200

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask_on, number) for number in range(2)]
        time.sleep(0.3)
        assert server.end(signal.SIGTERM) == 0
        assert min(ended.result() for ended in running) > 0


@pytest.mark.slow
def test_a_server_bounds_what_it_takes_and_ends_when_it_has_answered(copied):
    user = load_bundle(copied, load_towers=False).users["user_id"][0].as_py()
    server = Server(copied, "--seconds=0.5", "--queue=4")
    try:
        check_bounds(server)
        check_overload(server)
        check_end(server, user)
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def test_what_a_stranger_sends_fills_no_log():
    def is_written(level, path):
        return server._is_of_the_server(logging.makeLogRecord({"levelno": level, "pathname": path}))

    for module in (httptools_impl, retriever):
        assert not is_written(logging.WARNING, module.__file__)
        assert is_written(logging.ERROR, module.__file__)
    assert is_written(logging.WARNING, server.__file__)
