"""What stands between the network and the SuperLink: who is answered, with how much, and when.

Stock Flower reads a request of any size into memory before it asks who sends it, takes whatever a
node sends, and answers each look for messages at once, so that sites must look often. Here a
stranger's request is not read, others have a largest size and a time to come in, few are worked on
at a time, a node stores no more than an answer to what it was asked, and a look for messages is
answered when there is one, or after a while: a site hears of an ask at once and an idle federation
is quiet.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any

from lepton_fed.flower import compat, compat_fleet
from lepton_fed.flower.heap import Sweeper
from lepton_fed.flower.quota import Quota

__all__ = ["SECRET_HEADER", "Bell", "FleetOnly", "WithSecret"]

SECRET_HEADER = "x-lepton-secret"  # noqa: S105 - its name, not its value
"""Header that opens the coordinator's own listener."""

_HOLD_S = 10.0  # below the 30 s after which a SuperNode gives a call up
_MOST_SMALL = 64 * 1024
_MOST_BODY = {
    compat_fleet.PUSH_OBJECT_PATH: compat.CHUNK_BYTES + 1024 * 1024,  # a chunk and its envelope
    compat_fleet.PUSH_PATH: 1024 * 1024,  # the list of what a message consists of
}
_PIECE = 256 * 1024
_LINE_S = 30.0
_LINES = 10  # a chunk in five minutes is the slowest line that there is
_OF_A_NODE = 8
_AT_A_TIME = 4  # SQLite writes one after another; more would only hold more in memory

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Signer = Callable[[Iterable[tuple[bytes, bytes]], frozenset[bytes]], bytes | None]


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
    """Answers what SuperNodes of the roster ask, 401 to strangers, and 404 to everything else.

    Who asks is looked at before anything of a request's body is read, and each node has a few
    requests worked on at a time: what one of them holds back holds up no other.

    Args:
        app: The SuperLink.
        bell: Rung when there are messages for sites.
        hold_s: Seconds after which a look for messages is answered in any case.
        sweeper: Told how many bytes come and go.
        quota: Says what a node may leave here.
        signer: From a request's headers, and the keys that are let in, to the one of them that
            signed it, PEM; None when none did.
        line_s: Seconds that a piece of a request or an answer may take.
    """

    def __init__(
        self,
        app: App,
        bell: Bell,
        hold_s: float = _HOLD_S,
        sweeper: Sweeper | None = None,
        quota: Quota | None = None,
        signer: Signer = compat_fleet.signer,
        line_s: float = _LINE_S,
    ) -> None:
        self._app = app
        self._bell = bell
        self._hold_s = hold_s
        self._turn = asyncio.Semaphore(_AT_A_TIME)
        self._heard: dict[bytes, int] = {}
        self._sweeper = sweeper or Sweeper()
        self._quota = quota or Quota()
        self._signer = signer
        self._line_s = line_s
        self._keys: frozenset[bytes] = frozenset()
        self._of_node: dict[bytes, asyncio.Semaphore] = {}

    def let_in(self, keys: Iterable[bytes]) -> None:
        """Answer who signs with one of these keys, PEM, and nobody else."""
        self._keys = frozenset(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def in_time(message: MutableMapping[str, Any]) -> None:
            async with asyncio.timeout(self._line_s):
                await send(message)

        try:
            await self._answer(scope, receive, in_time)
        except TimeoutError:
            _cut(send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not path.startswith(compat.FLEET_PATH):
            await _refuse(scope, send, 404)
            return
        key = self._signer(scope.get("headers", ()), self._keys)
        if key is None:
            await _refuse(scope, send, 401)
        elif path == compat.PULL_PATH:
            await self._look(scope, key, receive, send)
        else:
            async with self._of_node.setdefault(key, asyncio.Semaphore(_OF_A_NODE)):
                await self._hand_on(scope, path, receive, send)

    async def _hand_on(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        body = await _body(receive, _MOST_BODY.get(path, _MOST_SMALL), self._line_s)
        if body is None:
            await _refuse(scope, send, 413)
            return
        size, node, reply = len(body), None, None
        if path == compat_fleet.PUSH_PATH:
            reply = compat_fleet.announced(body)
            if reply is None or not self._quota.may_announce(*reply):
                await _refuse(scope, send, 403)
                return
        elif path == compat_fleet.PUSH_OBJECT_PATH:
            node = compat_fleet.storing_node(body)
            if node is None or not self._quota.has_room(node):
                await _refuse(scope, send, 403)
                return
        receive = _once(body)
        del body
        answer = await self._ask(scope, receive)
        if reply is not None and answer and answer[0].get("status") == 200:
            self._quota.announce(*reply)
        if node is not None and compat_fleet.was_stored(_content(answer)):
            self._quota.store(node, size)
        self._sweeper.passed(size + len(_content(answer)))
        await self._send(answer, send)

    async def _look(self, scope: Scope, key: bytes, receive: Receive, send: Send) -> None:
        """Answer a look for messages: at once, unless this node found none since the last ring."""
        body = await _body(receive, _MOST_SMALL, self._line_s)
        if body is None:
            await _refuse(scope, send, 413)
            return
        if not await _stays(receive, self._bell.wait(self._heard.get(key, -1), self._hold_s)):
            return  # a message that is handed out is handed out once: not to a line that is cut
        now = self._bell.rung
        found = await self._ask(scope, _once(body))
        # Only a node that was let in gets 200: one node cannot make another's look wait.
        if found and found[0].get("status") == 200:
            empty = not any(message.get("body") for message in found)
            self._heard[key] = now if empty else -1
        await self._send(found, send)

    async def _ask(self, scope: Scope, receive: Receive) -> list[MutableMapping[str, Any]]:
        """Return the SuperLink's answer: whoever waits for a line does not wait in its turn."""
        found: list[MutableMapping[str, Any]] = []

        async def keep(message: MutableMapping[str, Any]) -> None:
            found.append(message)

        async with self._turn:
            await self._app(scope, receive, keep)
        return found

    async def _send(self, answer: list[MutableMapping[str, Any]], send: Send) -> None:
        """Send an answer piece by piece: each has its time."""
        for message in answer:
            content = message.get("body", b"")
            for at in range(0, len(content), _PIECE):
                last = at + _PIECE >= len(content)
                more = message.get("more_body", False) or not last
                await send({**message, "body": content[at : at + _PIECE], "more_body": more})
            if not content:
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


async def _body(receive: Receive, most: int, line_s: float) -> bytes | None:
    """Return a request's body; None when it is too large, too slow, or its sender has gone."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_LINES * line_s):
            while True:
                async with asyncio.timeout(line_s):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    return None
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        return None


def _content(answer: list[MutableMapping[str, Any]]) -> bytes:
    return b"".join(message.get("body", b"") for message in answer)


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


def _cut(send: Send) -> None:
    """Close the line of an answer that is not taken; uvicorn itself would wait without end."""
    line = getattr(getattr(send, "__self__", None), "transport", None)
    if line is not None:
        line.abort()


async def _refuse(scope: Scope, send: Send, status: int) -> None:
    """Refuse a request and close the line: what else was sent on it is not looked at."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    headers = [(b"connection", b"close"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
