from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_fed.flower import compat, compat_fleet, listener
from lepton_fed.flower.heap import Sweeper
from lepton_fed.flower.listener import SECRET_HEADER, Bell, FleetOnly, WithSecret
from lepton_fed.flower.quota import Quota

NODE = compat.NODE_HEADER
LONG_S = 3600.0  # nobody waits that long: what waits is woken, or the test fails


class SuperLink:
    """Answers 200, 401 to strangers; notes what it is asked."""

    def __init__(self, messages: int = 0) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.messages = messages
        self.at_once = self.most_at_once = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        body = (await receive())["body"]
        await asyncio.sleep(0)
        self.asked.append((scope["path"], body))
        known = dict(scope["headers"]).get(NODE) != b"stranger"
        found = b"a message" if known and self.messages else b""
        self.messages -= bool(found)
        self.at_once -= 1
        await send({"type": "http.response.start", "status": 200 if known else 401, "headers": []})
        await send({"type": "http.response.body", "body": found})


def scope(path: str, node: bytes = b"north", **headers: bytes) -> dict[str, Any]:
    named = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    return {"type": "http", "path": path, "headers": [(NODE, node), *named]}


async def ask(
    app: Callable[..., Awaitable[None]],
    asked: Any,
    *parts: bytes,
    gone: asyncio.Event | None = None,
) -> tuple[int, bytes]:
    """Send a request, its body in parts, and return status and body of the answer.

    Args:
        app: Is asked.
        asked: The request's scope.
        parts: Of its body.
        gone: Set when whoever asks hangs up; None stays.
    """
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts or (b"",), start=1)
    ]
    said: list[Any] = []

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        said.append(message)

    await app(asked, receive, send)
    if not said:
        return 0, b""
    return said[0].get("status", 0), b"".join(message.get("body", b"") for message in said)


def signed(headers: Any, known: Any) -> bytes | None:
    """Take the node header for the key: whether a signature is right is flwr's part."""
    key: bytes | None = dict(headers).get(NODE)
    return key if key in known else None


def fleet(app: Any, hold_s: float = LONG_S, **more: Any) -> tuple[FleetOnly, Bell]:
    bell = Bell()
    front = FleetOnly(app, bell, hold_s, signer=signed, **more)
    front.let_in([b"north", b"south"])
    return front, bell


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/", ""])
def test_only_the_fleet_api_is_answered(path: str) -> None:
    app = SuperLink()
    assert asyncio.run(ask(fleet(app)[0], scope(path))) == (404, b"")
    assert app.asked == []


def test_a_websocket_is_closed() -> None:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(fleet(SuperLink())[0]({"type": "websocket", "path": "/v1/fleet/x"}, None, send))  # type: ignore[arg-type]
    assert said == [{"type": "websocket.close", "code": 1000}]


def test_a_request_is_handed_on_as_it_came() -> None:
    app = SuperLink()
    path = "/v1/fleet/pull-object"
    assert asyncio.run(ask(fleet(app)[0], scope(path), b"one ", b"two")) == (200, b"")
    assert app.asked == [(path, b"one two")]


def test_a_request_that_is_too_large_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(listener._MOST_BODY, "/v1/fleet/push-object", 8)
    monkeypatch.setattr(compat_fleet, "storing_node", lambda body: 7)
    quota = Quota()
    quota.ask(7, 0)
    app = SuperLink()
    parts = [b"12345", b"6789", b"never received"]
    path = scope("/v1/fleet/push-object")
    assert asyncio.run(ask(fleet(app, quota=quota)[0], path, *parts)) == (413, b"")
    assert app.asked == []
    assert asyncio.run(ask(fleet(app, quota=quota)[0], path, b"12345678")) == (200, b"")


def test_a_chunk_and_its_envelope_are_not_too_large() -> None:
    assert listener._MOST_BODY[compat_fleet.PUSH_OBJECT_PATH] >= compat.CHUNK_BYTES + 1024


def test_who_hangs_up_halfway_is_not_answered_by_the_superlink() -> None:
    app = SuperLink()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    asyncio.run(fleet(app)[0](scope("/v1/fleet/push-object"), receive, send))
    assert app.asked == []


@pytest.mark.parametrize("path", ["pull-messages", "push-messages", "push-object", "get-run"])
def test_nothing_of_a_stranger_is_read_and_its_line_is_closed(path: str) -> None:
    app = SuperLink()
    said: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("read")

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(fleet(app)[0](scope(f"/v1/fleet/{path}", node=b"stranger"), receive, send))
    assert said[0]["status"] == 401
    assert (b"connection", b"close") in said[0]["headers"]
    assert app.asked == []


def test_a_site_that_was_taken_off_is_a_stranger() -> None:
    front, _ = fleet(SuperLink())
    path = "/v1/fleet/get-run"
    assert asyncio.run(ask(front, scope(path)))[0] == 200
    front.let_in([b"south"])
    assert asyncio.run(ask(front, scope(path)))[0] == 401
    assert asyncio.run(ask(front, scope(path, node=b"south")))[0] == 200


@pytest.mark.parametrize(
    ("path", "most"),
    [("get-run", 64 * 1024), ("pull-messages", 64 * 1024), ("push-messages", 2**20)],
)
def test_only_a_part_may_be_large(path: str, most: int) -> None:
    app = SuperLink()
    assert asyncio.run(ask(fleet(app)[0], scope(f"/v1/fleet/{path}"), bytes(most + 1))) == (
        413,
        b"",
    )
    assert app.asked == []


def announces(
    monkeypatch: pytest.MonkeyPatch, reply: tuple[int, int] | None, quota: Quota
) -> tuple[int, int]:
    """Return the answer's status, and how often the SuperLink was asked."""
    app = SuperLink()
    monkeypatch.setattr(compat_fleet, "announced", lambda body: reply)
    status, _ = asyncio.run(ask(fleet(app, quota=quota)[0], scope(compat_fleet.PUSH_PATH), b"x"))
    return status, len(app.asked)


def test_a_node_announces_nothing_but_replies_of_few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quota(most_parts=10)
    assert announces(monkeypatch, (7, 1), quota) == (403, 0), "nobody asked"
    quota.ask(7, 0)
    assert announces(monkeypatch, None, quota) == (403, 0), "no reply"
    assert announces(monkeypatch, (7, 11), quota) == (403, 0)
    for _ in range(3):
        assert announces(monkeypatch, (7, 10), quota) == (200, 1)
    assert announces(monkeypatch, (7, 10), quota) == (403, 0)


def test_what_the_superlink_refuses_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node may name this one in its request: the SuperLink compares key and node."""
    quota = Quota(most_parts=1)
    quota.ask(7, 0)

    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(compat_fleet, "announced", lambda body: (7, 1))
    front, _ = fleet(refuses, quota=quota)
    for _ in range(9):
        assert asyncio.run(ask(front, scope(compat_fleet.PUSH_PATH, node=b"south"), b"x"))[0] == 401
    assert announces(monkeypatch, (7, 1), quota) == (200, 1)


@pytest.mark.parametrize("stored", [True, False])
def test_a_node_stores_no_more_than_there_is_room_for(
    stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, quota = SuperLink(), Quota()
    monkeypatch.setattr(compat_fleet, "storing_node", lambda body: 7)
    monkeypatch.setattr(compat_fleet, "was_stored", lambda answer: stored)
    front, _ = fleet(app, quota=quota)
    path, mib = scope(compat_fleet.PUSH_OBJECT_PATH), bytes(1024 * 1024)
    assert asyncio.run(ask(front, path, mib)) == (403, b"")
    quota.ask(7, 2 * len(mib))
    found = [asyncio.run(ask(front, path, mib))[0] for _ in range(30)]
    assert found == ([200] * 20 + [403] * 10 if stored else [200] * 30)
    assert len(app.asked) == found.count(200)


def test_who_takes_no_answer_holds_nobody_up_and_its_line_is_cut() -> None:
    cut: list[bool] = []

    class Line:
        """A connection as uvicorn has it."""

        transport = SimpleNamespace(abort=lambda: cut.append(True))

        async def send(self, message: Any) -> None:
            await asyncio.Event().wait()

    async def nothing() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def others() -> None:
        app = SuperLink(messages=20)
        front, _ = fleet(app, line_s=LONG_S)
        path = scope("/v1/fleet/pull-object", node=b"south")
        stuck = [asyncio.create_task(front(path, nothing, Line().send)) for _ in range(20)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(app.asked) == listener._OF_A_NODE, "of one node a few are worked on"
        assert await ask(front, scope("/v1/fleet/pull-object")) == (200, b"a message")
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)

    asyncio.run(others())
    assert cut == []
    front, _ = fleet(SuperLink(), line_s=0.001)
    asyncio.run(front(scope("/v1/fleet/pull-object"), nothing, Line().send))
    assert cut == [True]


def test_a_large_answer_is_sent_in_pieces_that_make_it_whole() -> None:
    whole = bytes(range(256)) * 5000
    sizes: list[int] = []

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": whole, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def look() -> tuple[int, bytes]:
        said: list[Any] = []

        async def send(message: Any) -> None:
            said.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        await fleet(large)[0](scope("/v1/fleet/pull-object"), receive, send)
        bodies = said[1:]
        sizes.extend(len(message["body"]) for message in bodies)
        assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False]
        return said[0]["status"], b"".join(message["body"] for message in bodies)

    assert asyncio.run(look()) == (200, whole)
    assert max(sizes) == listener._PIECE < len(whole)


def test_a_body_that_does_not_come_is_given_up() -> None:
    app = SuperLink()
    parts = [b"begun"]
    said: list[Any] = []

    async def receive() -> Any:
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop(), "more_body": True}

    async def send(message: Any) -> None:
        said.append(message)

    front, _ = fleet(app, line_s=0.001)
    asyncio.run(front(scope("/v1/fleet/push-object"), receive, send))
    assert said[0]["status"] == 413
    assert (b"connection", b"close") in said[0]["headers"]
    assert app.asked == []


def test_few_requests_are_worked_on_at_a_time() -> None:
    app = SuperLink()

    async def many() -> None:
        front, _ = fleet(app)
        await asyncio.gather(*(ask(front, scope("/v1/fleet/pull-object")) for _ in range(50)))

    asyncio.run(many())
    assert len(app.asked) == 50
    assert app.most_at_once == listener._AT_A_TIME


def test_a_second_look_for_messages_waits_until_there_are_some() -> None:
    app = SuperLink()

    async def looks() -> None:
        front, bell = fleet(app)
        assert await ask(front, scope(compat.PULL_PATH)) == (200, b"")
        second = asyncio.create_task(ask(front, scope(compat.PULL_PATH)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not second.done()
        assert len(app.asked) == 1
        app.messages = 2
        threading.Thread(target=bell.ring).start()
        assert await second == (200, b"a message")
        # There may be more than one: the next look does not wait.
        assert await ask(front, scope(compat.PULL_PATH)) == (200, b"a message")

    asyncio.run(looks())


@pytest.mark.parametrize("rung", [False, True])
def test_who_hung_up_while_it_waited_is_given_no_message(rung: bool) -> None:
    app = SuperLink()

    async def looks() -> None:
        front, bell = fleet(app)
        gone = asyncio.Event()
        await ask(front, scope(compat.PULL_PATH))
        cut = asyncio.create_task(ask(front, scope(compat.PULL_PATH), gone=gone))
        await asyncio.sleep(0)
        app.messages = 1
        gone.set()
        if rung:  # in the same moment
            bell.ring()
        assert await cut == (0, b"")
        bell.ring()
        assert await ask(front, scope(compat.PULL_PATH)) == (200, b"a message")

    asyncio.run(looks())


def test_messages_that_were_put_out_since_the_last_look_are_found_at_once() -> None:
    app = SuperLink()

    async def looks() -> None:
        front, bell = fleet(app)
        await ask(front, scope(compat.PULL_PATH))
        bell.ring()
        app.messages = 1
        assert await ask(front, scope(compat.PULL_PATH)) == (200, b"a message")

    asyncio.run(looks())


def test_a_look_is_answered_after_a_while_though_there_is_nothing() -> None:
    app = SuperLink()

    async def looks() -> None:
        front, _ = fleet(app, hold_s=0.001)
        for _ in range(3):
            assert await ask(front, scope(compat.PULL_PATH)) == (200, b"")

    asyncio.run(looks())
    assert len(app.asked) == 3


def test_who_knows_a_node_s_key_and_cannot_sign_does_not_learn_when_rounds_start() -> None:
    app = SuperLink()

    async def looks() -> None:
        front, _ = fleet(app)
        assert await ask(front, scope(compat.PULL_PATH)) == (200, b"")
        front._signer = lambda headers, known: None  # north's key, and no signature of north's
        assert await ask(front, scope(compat.PULL_PATH)) == (401, b""), "at once"
        assert len(app.asked) == 1

    asyncio.run(looks())


def test_a_stranger_s_looks_are_refused_and_make_nobody_wait() -> None:
    app = SuperLink()

    async def looks() -> None:
        front, _ = fleet(app)
        for _ in range(3):
            assert await ask(front, scope(compat.PULL_PATH, node=b"stranger")) == (401, b"")

    asyncio.run(looks())


def test_nobody_waits_once_the_bell_is_closed() -> None:
    async def looks() -> None:
        front, bell = fleet(SuperLink())
        await ask(front, scope(compat.PULL_PATH))
        waiting = asyncio.create_task(ask(front, scope(compat.PULL_PATH)))
        await asyncio.sleep(0)
        bell.close()
        assert await waiting == (200, b"")
        assert await ask(front, scope(compat.PULL_PATH)) == (200, b"")
        assert await ask(front, scope(compat.PULL_PATH)) == (200, b"")

    asyncio.run(looks())


def test_a_listener_with_a_secret_is_silent_without_it() -> None:
    app = SuperLink()
    front = WithSecret(app, "secret")
    path = "/v1/control/start-run"
    assert asyncio.run(ask(front, scope(path))) == (404, b"")
    assert asyncio.run(ask(front, scope(path, **{SECRET_HEADER: b"wrong"}))) == (404, b"")
    assert app.asked == []
    assert asyncio.run(ask(front, scope(path, **{SECRET_HEADER: b"secret"}))) == (200, b"")


def test_bytes_of_requests_and_answers_are_counted() -> None:
    swept: list[None] = []
    sweeper = Sweeper(12, lambda: swept.append(None))
    app, _ = fleet(SuperLink(messages=9), sweeper=sweeper)
    asyncio.run(ask(app, scope("/v1/fleet/pull-object"), b"ab"))  # 2 bytes, and 9 that answer
    assert not swept
    asyncio.run(ask(app, scope("/v1/fleet/pull-object"), b"a"))
    assert len(swept) == 1
