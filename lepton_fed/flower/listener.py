"""What stands between the network and the SuperLink: who is answered, with how much, and when.

Stock Flower reads a request of any size into memory before it asks who sends it, and answers each
look for messages at once, so that sites must look often. Here a request has a largest size, few are
worked on at a time, and a look for messages is answered when there is one, or after a while: a site
hears of an ask at once and an idle federation is quiet.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from lepton_fed.flower import compat
from lepton_fed.flower.heap import Sweeper

__all__ = ["SECRET_HEADER", "Bell", "FleetOnly", "WithSecret"]

SECRET_HEADER = "x-lepton-secret"  # noqa: S105 - its name, not its value
"""Header that opens the coordinator's own listener."""

_HOLD_S = 10.0  # below the 30 s after which a SuperNode gives a call up
_MOST_BYTES = compat.CHUNK_BYTES + 1024 * 1024  # a chunk, or a list of what a message consists of
_AT_A_TIME = 4  # SQLite writes one after another; more would only hold more in memory

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Bell:
    """Tells those who wait on any event loop that messages were put out for sites."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._closed = False
        self.rung = 0

    def ring(self) -> None:
        """Wake everyone who waits."""
        with self._lock:
            self.rung += 1
            for loop, event in self._waiting:
                loop.call_soon_threadsafe(event.set)
            self._waiting.clear()

    def close(self) -> None:
        """Let nobody wait any more."""
        self._closed = True
        self.ring()

    async def wait(self, heard: int, seconds: float) -> None:
        """Wait until it is rung more often than it was heard, or time is up."""
        event = asyncio.Event()
        place = (asyncio.get_running_loop(), event)
        with self._lock:
            if self.rung != heard or self._closed:
                return
            self._waiting.add(place)
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            with self._lock:
                self._waiting.discard(place)


class FleetOnly:
    """Answers what SuperNodes ask, and 404 to everything else.

    Args:
        app: The SuperLink.
        bell: Rung when there are messages for sites.
        hold_s: Seconds after which a look for messages is answered in any case.
        sweeper: Told how many bytes come and go.
    """

    def __init__(
        self, app: App, bell: Bell, hold_s: float = _HOLD_S, sweeper: Sweeper | None = None
    ) -> None:
        self._app = app
        self._bell = bell
        self._hold_s = hold_s
        self._turn = asyncio.Semaphore(_AT_A_TIME)
        self._heard: dict[bytes, int] = {}
        self._sweeper = sweeper or Sweeper()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not path.startswith(compat.FLEET_PATH):
            await _refuse(scope, send, 404)
            return
        body = await _body(receive)
        if body is None:
            await _refuse(scope, send, 413)
        elif path == compat.PULL_PATH:
            await self._look(scope, body, receive, send)
        else:
            size = len(body)

            async def count(message: MutableMapping[str, Any]) -> None:
                nonlocal size
                size += len(message.get("body", b""))
                await send(message)

            async with self._turn:
                receive = _once(body)
                del body
                await self._app(scope, receive, count)
            self._sweeper.passed(size)

    async def _look(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Answer a look for messages: at once, unless this node found none since the last ring."""
        node = dict(scope.get("headers", ())).get(compat.NODE_HEADER, b"")
        if not await _stays(receive, self._bell.wait(self._heard.get(node, -1), self._hold_s)):
            return  # a message that is handed out is handed out once: not to a line that is cut
        now = self._bell.rung
        found: list[MutableMapping[str, Any]] = []

        async def keep(message: MutableMapping[str, Any]) -> None:
            found.append(message)

        async with self._turn:
            await self._app(scope, _once(body), keep)
        # Only a node that was let in gets 200: a stranger cannot make another's look wait.
        if found and found[0].get("status") == 200:
            empty = not any(message.get("body") for message in found)
            self._heard[node] = now if empty else -1
        for message in found:
            await send(message)


class WithSecret:
    """Answers requests that carry the secret, and 404 to everything else.

    Args:
        app: The SuperLink.
        secret: Opens it.
    """

    def __init__(self, app: App, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        given = dict(scope.get("headers", ())).get(SECRET_HEADER.encode(), b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, self._secret):
            await self._app(scope, receive, send)
        else:
            await _refuse(scope, send, 404)


async def _body(receive: Receive) -> bytes | None:
    """Return a request's body; None when it is too large or its sender has gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > _MOST_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def _stays(receive: Receive, wait: Coroutine[Any, Any, None]) -> bool:
    """Wait; return whether the sender of a request, which was read, is there still."""
    waited, gone = asyncio.ensure_future(wait), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((waited, gone), return_when=asyncio.FIRST_COMPLETED)
        return not gone.done()
    finally:
        waited.cancel()
        gone.cancel()
        await asyncio.gather(waited, gone, return_exceptions=True)


def _once(body: bytes) -> Receive:
    """Return what receives a body that was read already; the sender is then taken to stay."""
    waiting = [body]

    async def receive() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await asyncio.Event().wait()  # whoever listens for a hang-up is cancelled in the end
        raise AssertionError

    return receive


async def _refuse(scope: Scope, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})
