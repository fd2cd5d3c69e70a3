"""What lepton-fed relies on in flwr beyond its documented interface, name by name.

When flwr is updated this file fails first. Then read flwr's changes, check each name here against
lepton_fed/flower/compat.py, grid.py, records.py and stock.py, and only then move the version on.
"""

from __future__ import annotations

import inspect

import flwr
import flwr.serverapp.strategy as stock
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from lepton_fed.flower import compat
from lepton_fed.flower.compat import COORDINATOR_NODE, set_identity, set_message_id
from lepton_fed.flower.grid import InProcessGrid


@pytest.fixture(autouse=True)
def _identity() -> None:
    set_identity(1, COORDINATOR_NODE)


def message() -> Message:
    return Message(RecordDict({"head": ConfigRecord({"round": 1})}), 7, "train", group_id="1")


def test_this_is_the_flwr_that_was_checked() -> None:
    assert flwr.__version__.startswith("1.41."), (
        f"flwr {flwr.__version__} is not 1.41: re-check TaskIdentity, Message and its metadata, "
        "AppExitException, Grid's abstract methods, the node counts of stock strategies, Array and "
        "the environment switches; then update this file, compat.py and pyproject.toml"
    )


def test_compat_offers_what_is_checked_here() -> None:
    assert compat.__all__ == [
        "COORDINATOR_NODE",
        "AppExitException",
        "set_identity",
        "set_message_id",
    ]


def test_a_message_needs_an_identity_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        message()
    set_identity(run_id=5, node_id=COORDINATOR_NODE)
    found = message().metadata
    assert (found.run_id, found.src_node_id, found.dst_node_id) == (5, COORDINATOR_NODE, 7)


def test_a_message_has_no_id_until_it_is_given_one_and_a_reply_refers_to_it() -> None:
    asked = message()
    assert asked.metadata.message_id == ""
    with pytest.raises(AttributeError):
        asked.metadata.message_id = "x"  # type: ignore[misc]
    set_message_id(asked, "message-3")
    assert asked.metadata.message_id == "message-3"
    reply = Message(RecordDict(), reply_to=asked)
    assert reply.metadata.reply_to_message_id == "message-3"
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (7, COORDINATOR_NODE)


def test_the_content_of_a_message_can_be_replaced() -> None:
    asked = message()
    asked.content = RecordDict()
    assert len(asked.content) == 0
    assert asked.has_content()
    assert not asked.has_error()


def test_an_error_reply_has_a_code_and_a_reason() -> None:
    asked = message()
    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError"), reply_to=asked)
    assert reply.has_error()
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (2, "ValueError")


def test_what_strategies_raise_has_the_base_that_is_caught() -> None:
    for kind in (AggregationError, InconsistentMessageReplies):
        assert issubclass(kind, compat.AppExitException)
    assert issubclass(compat.AppExitException, Exception)


def test_our_grid_has_every_method_of_flwrs_with_its_arguments() -> None:
    assert Grid.__abstractmethods__ == {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }
    for name in Grid.__abstractmethods__ - {"run"}:
        theirs = inspect.signature(getattr(Grid, name)).parameters
        ours = inspect.signature(getattr(InProcessGrid, name)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name


def test_a_stock_strategy_says_how_many_nodes_it_waits_for() -> None:
    strategy = stock.FedAvg()
    assert strategy.min_available_nodes == strategy.min_train_nodes == 2
    assert strategy.fraction_train == 1.0
    assert strategy.weighted_by_key == "num-examples"
    # It waits for the larger of both numbers: this is what `_least_nodes` counts on.
    source = inspect.getsource(sample_nodes)
    assert "min_available_nodes = max(min_available_nodes, sample_size)" in source
    assert "while len(all_nodes := list(grid.get_node_ids())) < min_available_nodes" in source
    assert "max(num_nodes, self.min_train_nodes)" in inspect.getsource(strategy.configure_train)


def test_the_noise_of_the_dp_wrappers_comes_from_numpys_global_generator() -> None:
    # The reason why they are refused; when this fails, look again.
    from flwr.supercore import differential_privacy

    assert "np.random.normal" in inspect.getsource(differential_privacy)


def test_an_array_keeps_a_serialisation_of_our_own_on_the_wire() -> None:
    array = Array("float32", (2,), "lepton.f4le", bytes(range(8)))
    record = RecordDict({"vectors": ArrayRecord({"delta": array})})
    found = recorddict_from_proto(recorddict_to_proto(record))
    assert found["vectors"]["delta"] == array


def test_an_array_keeps_a_serialisation_of_our_own_in_the_object_store() -> None:
    array = Array("float32", (3_000_000,), "lepton.f4le", bytes(12_000_000))  # several chunks
    head = ConfigRecord({"weight": 0.5, "why": "ä", "train": True, "seed": 2**53})
    sent = Message(RecordDict({"head": head, "v": ArrayRecord({"delta": array})}), 7, "train")
    objects = get_all_nested_objects(sent)
    contents = {key: each.deflate() for key, each in objects.items()}
    found = inflate_object_from_contents(sent.object_id, contents)
    assert isinstance(found, Message)
    assert found.content["v"]["delta"] == array
    assert dict(found.content["head"]) == dict(head)
    assert {k: type(v) for k, v in found.content["head"].items()} == {
        "weight": float,
        "why": str,
        "train": bool,
        "seed": int,
    }
