from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lepton_fed.flower import compat, listener
from lepton_fed.flower.heap import Sweeper
from lepton_fed.flower.listener import SECRET_HEADER, Bell, FleetOnly, WithSecret

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


def fleet(app: SuperLink, hold_s: float = LONG_S) -> tuple[FleetOnly, Bell]:
    bell = Bell()
    return FleetOnly(app, bell, hold_s), bell


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
    path = "/v1/fleet/push-object"
    assert asyncio.run(ask(fleet(app)[0], scope(path), b"one ", b"two")) == (200, b"")
    assert app.asked == [(path, b"one two")]


def test_a_request_that_is_too_large_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "_MOST_BYTES", 8)
    app = SuperLink()
    parts = [b"12345", b"6789", b"never received"]
    path = scope("/v1/fleet/push-object")
    assert asyncio.run(ask(fleet(app)[0], path, *parts)) == (413, b"")
    assert app.asked == []
    assert asyncio.run(ask(fleet(app)[0], path, b"12345678")) == (200, b"")


def test_a_chunk_and_its_envelope_are_not_too_large() -> None:
    assert listener._MOST_BYTES >= compat.CHUNK_BYTES + 1024


def test_who_hangs_up_halfway_is_not_answered_by_the_superlink() -> None:
    app = SuperLink()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    asyncio.run(fleet(app)[0](scope("/v1/fleet/push-object"), receive, send))
    assert app.asked == []


def test_few_requests_are_worked_on_at_a_time() -> None:
    app = SuperLink()

    async def many() -> None:
        front, _ = fleet(app)
        await asyncio.gather(*(ask(front, scope("/v1/fleet/push-object")) for _ in range(50)))

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
    app = FleetOnly(SuperLink(messages=9), Bell(), sweeper=sweeper)
    asyncio.run(ask(app, scope("/v1/fleet/push-object"), b"ab"))  # 2 bytes, and 9 that answer
    assert not swept
    asyncio.run(ask(app, scope("/v1/fleet/push-object"), b"a"))
    assert len(swept) == 1
