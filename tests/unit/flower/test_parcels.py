"""Replies as a stranger may build them: each part is made by hand here."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from lepton_fed.core.exchange import Reply, Update
from lepton_fed.errors import RunError, UpdateRefused
from lepton_fed.flower import parcels
from lepton_fed.flower.compat import COORDINATOR_NODE, MALFORMED, set_identity, set_message_id
from lepton_fed.flower.parcels import FiledArray, FiledVector, Post, unpack
from lepton_fed.flower.quota import Quota
from lepton_fed.flower.records import record_to_reply, reply_to_record
from lepton_fed.flower.seal import Sealing, contents_digest
from lepton_fed.identity.signature import PrivateKey

LARGE = 600_000  # elements: 2.4 MB, more than is kept in memory


@pytest.fixture(autouse=True)
def _identity() -> None:
    set_identity(1, COORDINATOR_NODE)


def part(kind: str, children: Iterable[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def name_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Tree:
    """A reply's parts; what is to be wrong with it is said by arguments."""

    def __init__(self) -> None:
        self.parts: dict[str, bytes] = {}
        self.read: list[str] = []

    def put(self, kind: str, children: Iterable[str], body: Any) -> str:
        content = part(
            kind, children, body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        self.parts[name_of(content)] = content
        return name_of(content)

    def array(self, data: bytes, chunk: int = 1 << 20, **about: Any) -> str:
        chunks = [data[at : at + chunk] for at in range(0, len(data), chunk)]
        names = [self.put("ArrayChunk", (), each) for each in chunks]
        unique = list(dict.fromkeys(names))
        told = {"dtype": "float32", "shape": [len(data) // 4], "stype": "lepton.f4le",
                "arraychunk_ids": [unique.index(name) for name in names]}  # fmt: skip
        return self.put("Array", unique, told | about)

    def message(self, array: str) -> str:
        record = self.put("ArrayRecord", [array], {"delta": array})
        return self.put("Message", [self.put("RecordDict", [record], {"vectors": record})], b"")

    def __call__(self, name: str) -> bytes | None:
        self.read.append(name)
        return self.parts.get(name)


def whole(tree: Tree, root: str, folder: Path, most: int = 4 * LARGE) -> RecordDict:
    reading = unpack(root, tree, folder, most)
    with pytest.raises(StopIteration) as end:
        next(reading)
    found: RecordDict = end.value.value
    return found


def refused(tree: Tree, root: str, folder: Path, most: int = 4 * LARGE) -> str:
    with pytest.raises(UpdateRefused) as error:
        next(unpack(root, tree, folder, most))
    (problem,) = error.value.problems
    assert problem.code == "LF4411"
    assert list(folder.iterdir()) == []
    return problem.what


def update(size: int = LARGE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal(size, dtype=np.float32)


def parts_of(message: Message) -> dict[str, bytes]:
    return {name: each.deflate() for name, each in get_all_nested_objects(message).items()}


def sealed(reply: Reply) -> tuple[Tree, str]:
    """Return what a site sends: the tree that flwr makes of a reply."""
    record = Sealing("train reply", "north", "south", "n").seal(reply_to_record(reply), KEY)
    message = Message(record, 7, "train")
    tree = Tree()
    tree.parts = parts_of(message)
    return tree, message.object_id


KEY = PrivateKey.generate()


@pytest.mark.parametrize("size", [0, 1, 1000, LARGE, 3 * LARGE + 1])
def test_what_a_site_sends_is_read_as_it_was_sent(size: int, tmp_path: Path) -> None:
    delta = update(size)
    reply = Reply("", Update("layout", {"delta": delta}, 1.0), counts=np.ones(3), epsilon=0.5)
    tree, root = sealed(reply)
    content = whole(tree, root, tmp_path, 4 * size)
    assert isinstance(content["vectors"]["delta"], FiledArray) == (4 * size > 1 << 20)
    bare = Sealing("train reply", "north", "south", "n").check(content, KEY.public_key())
    assert contents_digest(bare) == contents_digest(reply_to_record(reply))
    found = record_to_reply("north", bare)
    assert found.update is not None
    assert found.counts is not None
    assert (found.counts.tolist(), found.epsilon) == ([1, 1, 1], 0.5)
    assert found.sent_bytes == 4 * size + 24
    vector = found.update.vectors["delta"]
    assert (vector.shape, vector.dtype, vector.nbytes) == ((size,), np.float32, 4 * size)
    assert np.array_equal(vector[0:size], delta)


def test_a_changed_byte_in_a_file_breaks_the_seal(tmp_path: Path) -> None:
    tree, root = sealed(Reply("", Update("layout", {"delta": update()}, 1.0)))
    (name, chunk), *_ = [(n, c) for n, c in tree.parts.items() if c.startswith(b"ArrayChunk")]
    tree.parts[name] = chunk[:-1] + bytes([chunk[-1] ^ 1])
    content = whole(tree, root, tmp_path)
    with pytest.raises(UpdateRefused, match="LF4414"):
        Sealing("train reply", "north", "south", "n").check(content, KEY.public_key())


def test_chunks_that_are_alike_are_sent_once_and_read_as_often_as_they_belong(
    tmp_path: Path,
) -> None:
    tree = Tree()
    data = np.tile(np.arange(1 << 18, dtype=np.float32), 3).tobytes()
    root = tree.message(tree.array(data))
    assert len([p for p in tree.parts.values() if p.startswith(b"ArrayChunk")]) == 1
    content = whole(tree, root, tmp_path, len(data))
    assert content["vectors"]["delta"].path.read_bytes() == data


def test_a_reply_is_read_on_as_its_parts_come(tmp_path: Path) -> None:
    tree = Tree()
    root = tree.message(tree.array(update().tobytes()))
    come = dict(tree.parts)
    for name in tree.parts:
        tree.parts[name] = b""
    reading = unpack(root, tree, tmp_path, 4 * LARGE)
    for name in reversed(come):
        next(reading)
        next(reading)  # nothing new: nothing happens
        tree.parts[name] = come[name]
    with pytest.raises(StopIteration) as end:
        next(reading)
    assert end.value.value["vectors"]["delta"].path.read_bytes() == update().tobytes()


def test_a_reading_that_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    tree = Tree()
    root = tree.message(tree.array(update().tobytes()))
    last = [name for name, p in tree.parts.items() if p.startswith(b"ArrayChunk")][-1]
    tree.parts[last] = b""
    reading = unpack(root, tree, tmp_path, 4 * LARGE)
    next(reading)
    assert len(list(tmp_path.iterdir())) == 1
    reading.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("elements", [2_500_000_000, 2**40])
def test_an_array_larger_than_any_expected_is_refused_unread(elements: int, tmp_path: Path) -> None:
    tree = Tree()
    array = tree.array(bytes(1 << 20), shape=[elements])
    what = refused(tree, tree.message(array), tmp_path)
    assert f"{4 * elements} bytes, where at most {4 * LARGE} are expected" in what
    assert not any(tree.parts[name].startswith(b"ArrayChunk") for name in tree.read)


def test_where_nothing_large_was_sent_nothing_large_is_taken(tmp_path: Path) -> None:
    tree = Tree()
    root = tree.message(tree.array(update().tobytes()))
    assert "expected" in refused(tree, root, tmp_path, most=0)
    small = tree.message(tree.array(update(100).tobytes()))
    assert whole(tree, small, tmp_path, most=0)["vectors"]["delta"].data == update(100).tobytes()


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"dtype": "float16"}, "an array of float16"),
        ({"dtype": ["float32"]}, "an array of"),
        ({"stype": None}, "an array of float32"),
        ({"shape": [2, LARGE // 2]}, "shape"),
        ({"shape": [-LARGE]}, "shape"),
        ({"shape": [2**40 + 1]}, "shape"),
        ({"shape": [int("9" * 4300)]}, "shape"),
        ({"shape": [True]}, "shape"),
        ({"shape": [float(LARGE)]}, "shape"),
        ({"shape": "x"}, "shape"),
        ({"shape": None}, "shape"),
        ({"shape": [LARGE - 1]}, "more than it says"),
        ({"shape": [LARGE - 300_000]}, "more than it says"),
        ({"shape": [10]}, "in 3 chunks"),
        ({"arraychunk_ids": None}, "where its chunks belong"),
        ({"arraychunk_ids": [0, 1]}, "where its chunks belong"),
        ({"arraychunk_ids": [0, 1, 3]}, "where its chunks belong"),
        ({"arraychunk_ids": [0, 1, -1]}, "where its chunks belong"),
        ({"arraychunk_ids": [0, 1, "2"]}, "where its chunks belong"),
        ({"arraychunk_ids": [0, 1, 2, 2]}, "more than it says"),
        ({"arraychunk_ids": [0, 1, 2] * 1000}, "3000 chunks"),
    ],
)
def test_an_array_that_lies_about_itself_is_refused(
    about: dict[str, Any], why: str, tmp_path: Path
) -> None:
    tree = Tree()
    assert why in refused(tree, tree.message(tree.array(update().tobytes(), **about)), tmp_path)


def test_chunks_in_another_order_are_another_array(tmp_path: Path) -> None:
    tree, right = Tree(), Tree()
    data = update(1 << 19).tobytes()
    content = whole(tree, tree.message(tree.array(data, arraychunk_ids=[1, 0])), tmp_path)
    other = whole(right, right.message(right.array(data)), tmp_path)
    assert content["vectors"]["delta"].sha256 != other["vectors"]["delta"].sha256


@pytest.mark.parametrize("size", [LARGE, 100])
def test_an_array_that_lacks_bytes_is_refused(size: int, tmp_path: Path) -> None:
    tree = Tree()
    array = tree.array(update(size).tobytes()[:-4], shape=[size])
    assert "lacks 4 bytes" in refused(tree, tree.message(array), tmp_path)


def test_an_empty_chunk_is_refused(tmp_path: Path) -> None:
    tree = Tree()
    chunk = tree.put("ArrayChunk", (), b"")
    about = {"dtype": "float32", "shape": [1], "stype": "x", "arraychunk_ids": [0]}
    assert "empty" in refused(tree, tree.message(tree.put("Array", [chunk], about)), tmp_path)


def test_a_part_that_will_not_come_is_refused(tmp_path: Path) -> None:
    tree = Tree()
    root = tree.message(tree.array(update().tobytes()))
    last = [name for name, p in tree.parts.items() if p.startswith(b"ArrayChunk")][-1]
    del tree.parts[last]
    assert "did not come" in refused(tree, root, tmp_path)


def test_more_arrays_than_any_update_has_are_refused(tmp_path: Path) -> None:
    tree = Tree()
    small = [tree.array(np.float32([n]).tobytes()) for n in range(17)]
    records = [
        tree.put("ArrayRecord", some, {f"a{n}": name for n, name in enumerate(some)})
        for some in (small[:9], small[9:])
    ]
    content = tree.put("RecordDict", records, dict(zip("ab", records, strict=True)))
    assert "more than 16 arrays" in refused(tree, tree.put("Message", [content], b""), tmp_path)
    all_in_one = tree.put("ArrayRecord", small, {f"a{n}": name for n, name in enumerate(small)})
    content = tree.put("RecordDict", [all_in_one], {"v": all_in_one})
    assert "17 records or arrays" in refused(tree, tree.put("Message", [content], b""), tmp_path)


def test_more_large_arrays_than_any_update_has_are_refused(tmp_path: Path) -> None:
    tree = Tree()
    array = tree.array(update().tobytes())
    record = tree.put("ArrayRecord", [array], {f"a{n}": array for n in range(5)})
    content = tree.put("RecordDict", [record], {"v": record})
    assert "large arrays" in refused(tree, tree.put("Message", [content], b""), tmp_path)


def test_a_tree_of_other_kinds_is_refused(tmp_path: Path) -> None:
    tree = Tree()
    array = tree.array(update(10).tobytes())
    head = tree.put("ConfigRecord", (), b"")
    empty = tree.put("RecordDict", [], {})
    record = tree.put("ArrayRecord", [head], {"delta": head})
    assert "a part is Array, not Message" in refused(tree, array, tmp_path)
    assert "of 0 contents" in refused(tree, tree.put("Message", [], b""), tmp_path)
    assert "of 2 contents" in refused(tree, tree.put("Message", [empty, head], b""), tmp_path)
    assert "not RecordDict" in refused(tree, tree.put("Message", [head], b""), tmp_path)
    content = tree.put("RecordDict", [record], {"v": record})
    assert "not Array" in refused(tree, tree.put("Message", [content], b""), tmp_path)
    content = tree.put("RecordDict", [array], {"v": array})
    assert "no such record" in refused(tree, tree.put("Message", [content], b""), tmp_path)
    content = tree.put("RecordDict", [record], {"v": head})
    assert "others than it has" in refused(tree, tree.put("Message", [content], b""), tmp_path)
    content = tree.put("RecordDict", [head], {"v": head, "w": 5})
    assert "others than it has" in refused(tree, tree.put("Message", [content], b""), tmp_path)
    chunk = tree.put("Array", [head], {"dtype": "float32", "shape": [1], "stype": "x",
                                       "arraychunk_ids": [0]})  # fmt: skip
    assert "not ArrayChunk" in refused(tree, tree.message(chunk), tmp_path)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"v": ' * 50_000, b"x" * ((1 << 20) + 1)],
)
def test_a_part_that_cannot_be_read_is_refused(body: bytes, tmp_path: Path) -> None:
    tree = Tree()
    refused(tree, tree.put("Message", [tree.put("RecordDict", [], body)], b""), tmp_path)
    refused(tree, tree.message(tree.put("Array", [], body)), tmp_path)
    head = tree.put("ConfigRecord", (), body or b"\xff")
    content = tree.put("RecordDict", [head], {"head": head})
    refused(tree, tree.put("Message", [content], b""), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"Message", b"Message  5\0abc", b"Message  x\0", b"\xff  0\0", b"a b c d\0"]
)
def test_what_is_no_part_at_all_is_refused(content: bytes, tmp_path: Path) -> None:
    tree = Tree()
    tree.parts["root"] = content or b" "
    refused(tree, "root", tmp_path)


# --- the post


class SuperLink:
    """The SuperLink's register of messages and parts."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.replies: dict[str, tuple[Message, str]] = {}
        self.tree = Tree()
        self.forgotten: list[str] = []
        self.asked_for: list[list[str]] = []

    def get_node_ids(self) -> list[int]:
        return [7]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.sent = list(messages)
        for number, message in enumerate(self.sent):
            set_message_id(message, f"ask-{number}")
        return [f"ask-{number}" for number in range(len(self.sent))]

    def claim(self, message_ids: Iterable[str]) -> Iterator[tuple[Message, str]]:
        self.asked_for.append(list(message_ids))
        for message_id in self.asked_for[-1]:
            if message_id in self.replies:
                yield self.replies.pop(message_id)

    def part(self, object_id: str) -> bytes | None:
        return self.tree(object_id)

    def forget(self, object_id: str) -> None:
        self.forgotten.append(object_id)

    def answer(self, number: int, root: str, error: Error | None = None) -> None:
        reply = Message(error or RecordDict(), reply_to=self.sent[number])
        if error is None:
            reply = make_message(metadata=reply.metadata, content=RecordDict())
        self.replies[f"ask-{number}"] = (reply, root)


def post(folder: Path, asks: int = 2) -> tuple[Post, SuperLink, list[str]]:
    link = SuperLink()
    made = Post(link, folder)
    model = Array("float32", (LARGE,), "lepton.f4le", bytes(4 * LARGE))
    content = RecordDict({"vectors": ArrayRecord({"model": model})})
    return made, link, made.push_messages([Message(content, 7, "train") for _ in range(asks)])


def test_replies_come_as_they_are_whole_and_their_files_go(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path)
    assert list(made.pull_messages(ids)) == []
    first = link.tree.message(link.tree.array(update().tobytes()))
    second = link.tree.message(link.tree.array(update(LARGE - 1).tobytes()))
    link.answer(1, second)
    link.answer(0, first)
    missing = link.tree.parts[first]
    link.tree.parts[first] = b""  # still on its way
    (reply,) = made.pull_messages(ids)
    assert reply.metadata.reply_to_message_id == "ask-1"
    assert link.forgotten == [second]
    link.tree.parts[first] = missing
    for reply in made.pull_messages(ids):
        assert reply.metadata.reply_to_message_id == "ask-0"
        (file,) = tmp_path.iterdir()
        assert reply.content["vectors"]["delta"].path == file
    assert list(tmp_path.iterdir()) == []
    assert link.forgotten == [second, first]
    assert list(made.pull_messages(["ask-0"])) == []


def test_a_reply_that_is_on_its_way_is_not_asked_for_again(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path)
    link.tree.parts["root"] = b""
    link.answer(0, "root")
    assert list(made.pull_messages(ids)) == []
    assert list(made.pull_messages(ids)) == []
    assert link.asked_for == [["ask-0", "ask-1"], ["ask-1"]]


def test_files_go_too_when_nobody_takes_the_next_reply(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path)
    link.answer(0, link.tree.message(link.tree.array(update().tobytes())))
    replies = iter(made.pull_messages(ids))
    next(replies)
    assert len(list(tmp_path.iterdir())) == 1
    replies.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_a_reply_with_wrong_parts_is_an_error_and_the_next_still_comes(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path)
    link.answer(0, link.tree.message(link.tree.array(update().tobytes(), shape=[10**12])))
    link.answer(1, link.tree.message(link.tree.array(update().tobytes())))
    broken, good = list(made.pull_messages(ids))
    assert broken.error.code == MALFORMED
    assert "4000000000000 bytes" in broken.error.reason
    assert broken.metadata.reply_to_message_id == "ask-0"
    assert good.has_content()
    assert len(link.forgotten) == 2


def test_what_reading_fails_of_is_the_site_s_failure_and_the_next_still_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, link, ids = post(tmp_path)
    link.answer(0, "strange")
    link.answer(1, link.tree.message(link.tree.array(update().tobytes())))
    opened = parcels.compat.opened

    def strange(content: bytes) -> Any:
        if content == b"strange":
            raise KeyError("nobody thought of this")
        return opened(content)

    link.tree.parts["strange"] = b"strange"
    monkeypatch.setattr(parcels.compat, "opened", strange)
    broken, good = list(made.pull_messages(ids))
    assert (broken.error.code, broken.error.reason) == (MALFORMED, "malformed message: KeyError")
    assert good.has_content()
    assert len(link.forgotten) == 2


def test_a_superlink_that_fails_is_no_site_s_failure(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path)
    link.answer(0, "root")

    def broken(object_id: str) -> bytes | None:
        raise OSError(28, "No space left on device")

    link.part = broken  # type: ignore[method-assign]
    with pytest.raises(RunError, match="LF5209"):
        list(made.pull_messages(ids))


def test_a_site_s_failure_is_handed_on(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path)
    link.answer(0, "root", Error(2, "LF5301"))
    (reply,) = made.pull_messages(ids)
    assert (reply.error.code, reply.error.reason) == (2, "LF5301")
    assert link.forgotten == ["root"]


def test_late_replies_are_dropped_unread_and_what_was_sent_is_removed(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path, 3)
    link.tree.parts["root"] = b""
    link.answer(0, "root")
    list(made.pull_messages(ids))  # begun
    link.answer(1, link.tree.message(link.tree.array(update().tobytes())))
    read = len(link.tree.read)
    assert made.drop_messages(ids) == ["ask-0", "ask-1"]
    assert len(link.tree.read) == read
    assert set(link.forgotten) > {"ask-0", "ask-1", "ask-2", "root"}
    assert made.drop_messages(["ask-2"]) == []


def test_a_reply_may_be_as_large_as_what_was_sent_and_no_larger(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path, 1)
    link.answer(0, link.tree.message(link.tree.array(update(LARGE + 1).tobytes())))
    (reply,) = made.pull_messages(ids)
    assert f"{4 * LARGE + 4} bytes, where at most {4 * LARGE} are expected" in reply.error.reason


def test_nodes_hear_of_messages_once_they_are_out(tmp_path: Path) -> None:
    link, rung = SuperLink(), []
    made = Post(link, tmp_path, lambda: rung.append(len(link.sent)))
    made.push_messages([Message(RecordDict({"h": ConfigRecord({})}), 7, "query.offer")])
    assert rung == [1]
    assert made.get_node_ids() == [7]


def test_a_reply_to_nothing_that_was_asked_is_forgotten(tmp_path: Path) -> None:
    made, link, ids = post(tmp_path, 1)
    link.answer(0, link.tree.message(link.tree.array(update().tobytes())))
    (reply, root) = link.replies["ask-0"]
    forged = Message(RecordDict(), 1, "train")  # an instruction to the coordinator
    link.claim = lambda ids: iter([(forged, "forged"), (reply, root)])  # type: ignore[method-assign]
    (found,) = made.pull_messages(ids)
    assert found.metadata.reply_to_message_id == "ask-0"
    assert link.forgotten == ["forged", root]
    assert made._arriving == {}


def test_room_is_made_for_what_is_asked_until_it_is_read_or_dropped(tmp_path: Path) -> None:
    link, quota = SuperLink(), Quota()
    made = Post(link, tmp_path, quota=quota)
    asks = [Message(RecordDict({"h": ConfigRecord({})}), node, "train") for node in (7, 8)]
    assert not quota.has_room(7)
    ids = made.push_messages(asks)
    assert quota.has_room(7)
    assert quota.has_room(8)
    link.answer(0, "root", Error(2, "LF5301"))
    assert len(list(made.pull_messages(ids))) == 1
    assert not quota.has_room(7)
    assert quota.has_room(8)
    for _ in range(2):
        made.drop_messages(ids)
        assert not quota.has_room(8)


@pytest.mark.parametrize("fails", [False, True])
def test_no_room_is_made_for_what_is_not_sent(fails: bool, tmp_path: Path) -> None:
    link, quota = SuperLink(), Quota()

    def unsent(messages: Iterable[Message]) -> list[str]:
        if fails:
            raise OSError(28, "No space left on device")
        return [""]

    link.push_messages = unsent  # type: ignore[method-assign]
    made = Post(link, tmp_path, quota=quota)
    with pytest.raises(RunError) if fails else contextlib.nullcontext():
        made.push_messages([Message(RecordDict(), 7, "train")])
    assert not quota.has_room(7)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "left").write_bytes(b"x")
    Post(SuperLink(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- a vector in a file


def filed(tmp_path: Path, size: int = 1000) -> tuple[FiledVector, np.ndarray[Any, Any]]:
    values = update(size)
    values.tofile(tmp_path / "v")
    return FiledVector(tmp_path / "v", size), values


@pytest.mark.parametrize(
    "part", [slice(0, 10), slice(990, 2000), slice(None), slice(5, 5), slice(9, 3), slice(-3, None)]
)
def test_a_vector_in_a_file_has_the_slices_of_an_array(part: slice, tmp_path: Path) -> None:
    vector, values = filed(tmp_path)
    (tmp_path / "v").unlink()
    assert np.array_equal(vector[part], values[part])
    assert vector[part].dtype == np.float32


def test_a_vector_in_a_file_is_read_as_it_lies(tmp_path: Path) -> None:
    vector, _ = filed(tmp_path)
    with pytest.raises(ValueError, match="as it lies"):
        vector[::2]
    assert vector.astype("<f4", copy=False) is vector
    with pytest.raises(TypeError):
        vector.astype("float64")


def test_a_vector_in_a_file_is_kept_without_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector, values = filed(tmp_path)
    vector.tofile(tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_ino == (tmp_path / "v").stat().st_ino

    def elsewhere(*paths: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(parcels.os, "link", elsewhere)
    vector.tofile(tmp_path / "copied")
    assert (tmp_path / "copied").stat().st_ino != (tmp_path / "v").stat().st_ino
    assert (tmp_path / "copied").read_bytes() == values.tobytes()
