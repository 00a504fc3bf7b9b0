"""The parent of several processes, and one of them as it ends, without processes."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest

from tests.serving.asking import make_app
from twotower.core.errors import ConfigError
from twotower.serving.processes import supervisor as module
from twotower.serving.processes.links import Handed, News
from twotower.serving.processes.member import Member
from twotower.serving.processes.supervisor import Supervisor
from twotower.serving.versions import routing
from twotower.serving.versions.routing import Location


@pytest.fixture
def parent(monkeypatch):
    """A parent of two, of which one has just ended by a mistake of its options."""
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(module, "mark_process_dead", lambda *_: None)
    process = SimpleNamespace(join=lambda: None, pid=1, exitcode=os.EX_CONFIG)
    ended = SimpleNamespace(process=process, pipe=SimpleNamespace(close=lambda: None))
    ended.is_early = False
    made = Supervisor(lambda _: None, None, 2, 1.0)
    made._children = {0: ended, 1: ended}
    return made


def test_a_process_that_cannot_start_again_ends_none_that_answer(parent, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(parent, "_start", lambda _, index, is_early: started.append(index))
    parent._ready = {1}
    parent._failures = module.MAX_FAILURES
    parent._replace(tmp_path, 0)
    assert started == [0]


def test_a_mistake_at_the_start_ends_all(parent, tmp_path):
    with pytest.raises(ConfigError, match="before they are ready"):
        parent._replace(tmp_path, 0)


def test_a_signal_amid_the_start_ends_the_process_that_is_being_started(tmp_path):
    parent = Supervisor(lambda _: None, None, 2, 1.0)
    started = []

    class Process:
        """A process whose start is interrupted by SIGTERM."""

        pid = 1
        sentinel = 1
        is_told = False

        def __init__(self, **_):
            started.append(self)

        def start(self):
            parent._end(signal.SIGTERM, None)

        def terminate(self):
            self.is_told = True

    class Pipe:
        def close(self):
            pass

    pipe = Pipe()
    parent._context = SimpleNamespace(Pipe=lambda: (pipe, pipe), Process=Process)
    parent._last = 0.0
    with pytest.MonkeyPatch.context() as patch:
        # All of them end as they are told to.
        patch.setattr(module.connection, "wait", lambda *_, **__: parent._children.clear() or [])
        parent._supervise(tmp_path)
    assert [process.is_told for process in started] == [True]


def test_a_change_that_comes_to_a_writer_at_its_end_goes_to_the_next_one(retriever, tmp_path):
    member = Member(tmp_path, 0, 2, None, is_early=True)
    app = make_app(retriever, tmp_path, member=member)
    member._served = app
    member.is_writer = True
    replies = []
    close = app.writer.close

    async def close_and_be_handed():
        await close()
        for message in (Handed("delete_item", "i", b""), News(None)):
            replies.append(await member._answer(message))

    app.writer.close = close_and_be_handed
    app.prepare = lambda: asyncio.sleep(0)
    member.start = lambda served: asyncio.sleep(0)

    async def live():
        async with app.live(app._starlette):
            app.drain()

    asyncio.run(live())
    assert all(reply.is_elsewhere and reply.problem is None for reply in replies)


def test_a_process_that_cannot_load_a_version_tells_the_writer(retriever, tmp_path):
    member = Member(tmp_path, 1, 2, None, is_early=True)
    app = make_app(retriever, tmp_path, member=member)
    member._served = app
    missing = Location("gone", str(tmp_path / "gone"), str(tmp_path / "gone"))
    state = routing.add(app.versions.state, "gone", missing)
    reply = asyncio.run(member._answer(News(state)))
    assert reply.problem is not None and "'gone' cannot be loaded" in reply.problem.detail
