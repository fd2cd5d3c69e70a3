"""Replies from a network, read part by part: no reply is ever in memory as a whole.

Flower sends a message as a tree of parts, each named by its hash: the message, its records, their
arrays, and the chunks of an array. Here the tree is walked from its root, so that what an array
says of itself is checked before a byte of it is read; the chunks of a large array then go into a
file, one after another, and are hashed on the way. Everything comes from a stranger: whatever is
not as it must be is an UpdateRefused, and the parts are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from lepton_fed.core.exchange import legible
from lepton_fed.errors import Problem, RunError, UpdateRefused
from lepton_fed.flower import compat
from lepton_fed.flower.failures import telling
from lepton_fed.flower.quota import Quota

__all__ = ["FiledArray", "FiledVector", "Parts", "Post", "unpack"]

_IN_MEMORY = 1024 * 1024  # bytes of an array that are not worth a file
_MOST_PART = 1024 * 1024  # bytes of a part that is no chunk
_MOST_RECORDS = 16
_MOST_ARRAYS = 16
_MOST_FILES = 4
_LEAST_CHUNK = 16 * 1024
_MOST_NUMBER = 2**40  # Python writes no number of more than 4300 digits, and says so by an error
_WIDTHS = {"float32": 4, "float64": 8, "uint8": 1}

Reading = Generator[None, None, Any]


class FiledArray(Array):
    """An array whose bytes are in a file.

    Args:
        dtype: Element type.
        shape: Shape.
        stype: How the bytes stand for elements.
        path: The file.
        sha256: Hash of its content, hexadecimal.
    """

    def __init__(
        self, dtype: str, shape: tuple[int, ...], stype: str, path: Path, sha256: str
    ) -> None:
        super().__init__(dtype, shape, stype, b"")
        self.path = path
        self.sha256 = sha256


class FiledVector:
    """A vector in a file. It has what admission, sums and spills ask of an array: slices.

    Args:
        path: The file, little-endian; it is held open, and may be removed meanwhile.
        size: Number of elements.
        dtype: Their type.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        dtype: np.dtype[Any] = np.dtype("<f4"),  # noqa: B008
    ) -> None:
        self.dtype = dtype
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = size

    @property
    def shape(self) -> tuple[int]:
        """Return its shape."""
        return (self.size,)

    @property
    def nbytes(self) -> int:
        """Return the bytes of its elements."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        """Return a slice, read from the file."""
        start, stop, step = part.indices(self.size)
        if step != 1:
            raise ValueError("a slice is read as it lies in the file")
        width = self.dtype.itemsize
        content = os.pread(self._descriptor, max(stop - start, 0) * width, start * width)
        return np.frombuffer(content, dtype=self.dtype)

    def astype(self, dtype: str, copy: bool = True) -> FiledVector:
        """Return this: its elements are of the type that they have in the file."""
        if np.dtype(dtype) != self.dtype:
            raise TypeError(f"the vector in the file is of {self.dtype}")
        return self

    def tofile(self, path: Path) -> None:
        """Have its content under another name too, without a second copy where that can be."""
        try:
            os.link(self._path, path)
        except OSError:  # another file system
            shutil.copyfile(self._path, path)


class Parts(Protocol):
    """Where the parts of messages are; see :class:`lepton_fed.flower.compat.PrivateGrid`."""

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that are online."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Put messages out and return their ids."""

    def claim(self, message_ids: Iterable[str]) -> Iterator[tuple[Message, str]]:
        """Take the replies that came since the last time, without their content."""

    def part(self, object_id: str) -> bytes | None:
        """Return a part; empty while it is on its way, None when it will not come."""

    def forget(self, object_id: str) -> None:
        """Remove a message's parts."""


class Post:
    """Sends messages to nodes and hands their replies on, one at a time.

    Args:
        parts: The SuperLink.
        folder: For the files of large arrays; what an earlier process left there is removed.
        sent: Called when messages were put out.
        quota: Told what is asked of whom, and when the answer is no longer awaited.

    Raises:
        RunError: LF5017, LF5018, LF5019 or LF5209, also from each method: the SuperLink failed, or
            the folder cannot be written.
    """

    @telling()
    def __init__(
        self,
        parts: Parts,
        folder: Path,
        sent: Callable[[], None] = lambda: None,
        quota: Quota | None = None,
    ) -> None:
        self._parts = parts
        self._folder = folder
        self._sent = sent
        self._quota = quota or Quota()
        self._most: dict[str, int] = {}
        self._asked: dict[str, tuple[int, int]] = {}
        self._arriving: dict[str, tuple[Message, str, Reading]] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()

    @telling()
    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that are online."""
        return self._parts.get_node_ids()

    @telling()
    def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> list[str]:
        """Put messages out and return their ids, empty for one that could not be.

        Args:
            messages: The messages.
            answer_bytes: Bytes of the array in an answer, where it is larger than what is sent.
        """
        messages = list(messages)
        most = [max(_largest(message.content), answer_bytes) for message in messages]
        asked = [
            (message.metadata.dst_node_id, max(_size(message.content), answer_bytes))
            for message in messages
        ]
        for node, size in asked:
            self._quota.ask(node, size)  # a node may answer before the last message is out
        pushed = [""] * len(messages)
        try:
            pushed = self._parts.push_messages(messages)
        finally:
            for message_id, (node, size) in zip(pushed, asked, strict=True):
                if message_id:
                    self._asked[message_id] = (node, size)
                else:
                    self._quota.end(node, size)
        self._most.update(zip(pushed, most, strict=True))
        self._sent()
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies to these messages that are here, each as soon as it is whole.

        The files of a reply are removed when the next is asked for. One that cannot be read is
        yielded as an error of its site.
        """
        wanted = list(message_ids)
        self._claim(wanted)
        for message_id in wanted:
            if message_id not in self._arriving:
                continue
            reply, root, reading = self._arriving[message_id]
            try:
                with telling(str(self._folder)):
                    next(reading)
                continue  # a part of it is on its way
            except StopIteration as end:
                whole = compat.with_content(reply, end.value)
            except RunError:
                raise
            except UpdateRefused as error:
                why = Error(compat.MALFORMED, error.problems[0].what)
                whole = compat.with_content(reply, why)
            except Exception as error:  # noqa: BLE001 - whatever a site sends, the run goes on
                why = Error(compat.MALFORMED, f"malformed message: {type(error).__name__}")
                whole = compat.with_content(reply, why)
            self._forget(message_id, root)
            try:
                yield whole
            finally:
                _remove_files(whole)
                del whole

    @telling()
    def drop_messages(self, message_ids: Iterable[str]) -> list[str]:
        """Drop the replies to these messages that came, unread, and what was sent.

        Returns:
            The ids of the messages that were replied to.
        """
        wanted = list(message_ids)
        for message_id in wanted:
            self._parts.forget(message_id)  # nobody is to begin with it any more
            self._end(message_id)
        self._claim(wanted)
        came = [message_id for message_id in wanted if message_id in self._arriving]
        for message_id in came:
            _, root, reading = self._arriving[message_id]
            reading.close()
            self._forget(message_id, root)
        return came

    @telling()
    def _claim(self, message_ids: list[str]) -> None:
        new = [message_id for message_id in message_ids if message_id not in self._arriving]
        if not new:
            return
        for reply, root in self._parts.claim(new):
            answered = reply.metadata.reply_to_message_id
            if answered not in new or answered in self._arriving:
                self._parts.forget(root)
                continue
            reading = _error(reply.error) if reply.has_error() else unpack(
                root, self._parts.part, self._folder, self._most.get(answered, 0)
            )  # fmt: skip
            self._arriving[answered] = (reply, root, reading)

    @telling()
    def _forget(self, message_id: str, root: str) -> None:
        self._parts.forget(root)
        self._arriving.pop(message_id)
        self._most.pop(message_id, None)
        self._end(message_id)

    def _end(self, message_id: str) -> None:
        asked = self._asked.pop(message_id, None)
        if asked is not None:
            self._quota.end(*asked)


def unpack(
    root: str, part: Callable[[str], bytes | None], folder: Path, most: int
) -> Generator[None, None, RecordDict]:
    """Read a message's content; yield while a part of it is on its way.

    Args:
        root: Id of the message's own part.
        part: From a part's id to its content; empty while it is on its way, None when it will not
            come.
        folder: For the files of large arrays.
        most: Largest number of bytes of an array beyond those that are small.

    Returns:
        The content; arrays of more than a mebibyte are :class:`FiledArray`.

    Raises:
        UpdateRefused: LF4411, the parts make no message, or one that is larger than it may be.
    """
    unpacking = _Unpacking(part, folder, max(most, _IN_MEMORY))
    try:
        content: RecordDict = yield from unpacking.content(root)
    except BaseException:
        unpacking.close()
        raise
    return content


class _Unpacking:
    def __init__(self, part: Callable[[str], bytes | None], folder: Path, most: int) -> None:
        self._part = part
        self._folder = folder
        self._most = most
        self._arrays = 0
        self._files: list[Path] = []

    def close(self) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)

    def content(self, root: str) -> Reading:
        _, children, _ = yield from self._open(root, "Message")
        if len(children) != 1:
            _refuse(f"a message of {len(children)} contents")
        _, children, body = yield from self._open(children[0], "RecordDict")
        records = {}
        for name, child in _named(children, body, _MOST_RECORDS).items():
            content = yield from self._fetch(child)
            kind, grandchildren, inner = _opened(content)
            if kind == "ArrayRecord":
                records[name] = yield from self._array_record(grandchildren, inner)
                continue
            _check_size(inner)
            records[name] = _small(content)
        return RecordDict(records)

    def _array_record(self, children: list[str], body: memoryview) -> Reading:
        arrays = ArrayRecord()  # made from a dict it would copy its arrays into plain ones
        for name, child in _named(children, body, _MOST_ARRAYS).items():
            self._arrays += 1
            if self._arrays > _MOST_ARRAYS:
                _refuse(f"more than {_MOST_ARRAYS} arrays")
            arrays[name] = yield from self._array(child)
        return arrays

    def _array(self, object_id: str) -> Reading:
        _, children, body = yield from self._open(object_id, "Array")
        about = _json(body)
        dtype, stype = about.get("dtype"), about.get("stype")
        shape, order = about.get("shape"), about.get("arraychunk_ids")
        if not (isinstance(dtype, str) and isinstance(stype, str) and dtype in _WIDTHS):
            _refuse(f"an array of {legible(str(dtype), 20)}")
        if not (_whole_numbers(shape) and len(shape) == 1):
            _refuse(f"an array of shape {legible(str(shape), 40)}")
        size = _WIDTHS[dtype] * shape[0]
        if size > self._most:
            _refuse(f"an array of {size} bytes, where at most {self._most} are expected")
        if not (_whole_numbers(order) and set(order) == set(range(len(children)))):
            _refuse("an array that does not say where its chunks belong")
        if len(order) > 1 + size // _LEAST_CHUNK:
            _refuse(f"an array of {size} bytes in {len(order)} chunks")
        chunks = (children[place] for place in order)
        if size <= _IN_MEMORY:
            held = bytearray()
            yield from self._chunks(chunks, size, held.extend)
            return Array(dtype, tuple(shape), stype, bytes(held))
        if len(self._files) == _MOST_FILES:
            _refuse(f"more than {_MOST_FILES} large arrays")
        path = self._folder / f"{object_id}-{len(self._files)}-{os.urandom(8).hex()}"
        self._files.append(path)
        hashed = hashlib.sha256()
        with path.open("xb", buffering=0) as file:

            def take(chunk: memoryview) -> None:
                hashed.update(chunk)
                while chunk:  # a file without a buffer may take less than it is given
                    chunk = chunk[file.write(chunk) :]

            yield from self._chunks(chunks, size, take)
        return FiledArray(dtype, tuple(shape), stype, path, hashed.hexdigest())

    def _chunks(
        self, chunks: Iterable[str], size: int, take: Callable[[memoryview], object]
    ) -> Reading:
        for chunk in chunks:
            _, _, body = yield from self._open(chunk, "ArrayChunk")
            if not 0 < len(body) <= size:
                _refuse("an array whose chunks are empty, or more than it says")
            size -= len(body)
            take(body)
        if size:
            _refuse(f"an array that lacks {size} bytes")

    def _open(self, object_id: str, wanted: str) -> Reading:
        content = yield from self._fetch(object_id)
        kind, children, body = _opened(content)
        if kind != wanted:
            _refuse(f"a part is {legible(kind, 20)}, not {wanted}")
        if wanted != "ArrayChunk":
            _check_size(body)
        return kind, children, body

    def _fetch(self, object_id: str) -> Generator[None, None, bytes]:
        while not (content := self._part(object_id)):
            if content is None:
                _refuse("a part of it did not come")
            yield
        return content


def _error(error: Error) -> Generator[None, None, Error]:
    """Return what a site's failure says of itself: there is nothing to read."""
    yield from ()
    return error


def _largest(content: RecordDict) -> int:
    """Return the bytes of the largest array of a message."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return max((len(a.data) for arrays in records for a in arrays.values()), default=0)


def _size(content: RecordDict) -> int:
    """Return the bytes of all arrays of a message."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(len(a.data) for arrays in records for a in arrays.values())


def _remove_files(message: Message) -> None:
    if not message.has_content():
        return
    for record in message.content.values():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                if isinstance(array, FiledArray):
                    array.path.unlink(missing_ok=True)


def _opened(content: bytes) -> tuple[str, list[str], memoryview]:
    with _refusing():
        return compat.opened(content)


def _small(content: bytes) -> ConfigRecord | MetricRecord:
    with _refusing():
        return compat.small_record(content)


def _json(body: memoryview) -> dict[str, Any]:
    with _refusing():
        found = json.loads(bytes(body))
    if not isinstance(found, dict):
        _refuse("a part without names")
    return found


def _named(children: list[str], body: memoryview, most: int) -> dict[str, str]:
    named = _json(body)
    if len(named) > most:
        _refuse(f"{len(named)} records or arrays, more than {most}")
    if not all(isinstance(c, str) for c in named.values()) or set(named.values()) != set(children):
        _refuse("a part that names others than it has")
    return named


def _whole_numbers(found: Any) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(
        type(one) is int and 0 <= one <= _MOST_NUMBER for one in found
    )


def _check_size(body: memoryview) -> None:
    if len(body) > _MOST_PART:
        _refuse(f"a part of {len(body)} bytes")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:  # also text that is no Unicode
        _refuse(legible(str(error), 80))


def _refuse(what: str) -> NoReturn:
    raise UpdateRefused(Problem("LF4411", f"malformed message: {what}"))
