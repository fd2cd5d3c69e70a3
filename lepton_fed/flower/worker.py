"""The site's end: takes what its SuperNode queued, and answers with local code only.

The bundle of code, the app id and the task type are the coordinator's words. The bundle is dropped
unread; another app or task type is answered with a refusal; nothing is unpacked, written, imported
or run. What a handler raises stays in the site's log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from lepton_fed.core.exchange import (
    Ask,
    Offer,
    OfferReply,
    PhaseAsk,
    PhaseReply,
    PushReply,
    PushStep,
    Reply,
)
from lepton_fed.errors import UpdateRefused
from lepton_fed.flower import compat
from lepton_fed.flower.records import (
    offer_reply_to_record,
    phase_reply_to_record,
    push_reply_to_record,
    record_to_ask,
    record_to_offer,
    record_to_phase,
    record_to_push,
    reply_to_record,
)
from lepton_fed.flower.seal import COORDINATOR, Sealing, nonce_of
from lepton_fed.flower.superlink import APP_ID
from lepton_fed.identity.signature import PrivateKey, PublicKey

__all__ = ["Answers", "serve", "site_app"]

_POLL_S = 0.05  # between two calls; each waits at the SuperNode until there is a task
_MOST_WAIT_S = 5.0

_log = logging.getLogger("lepton_fed.site")


class Answers(Protocol):
    """What a site says to what it is asked; free of flwr."""

    def offered(self, offer: Offer) -> OfferReply:
        """Answer an offer."""

    def asked(self, ask: Ask) -> Reply:
        """Answer an ask."""

    def phased(self, asked: PhaseAsk) -> PhaseReply:
        """Answer a phase of secure aggregation."""

    def pushed(self, step: PushStep) -> PushReply:
        """Answer a step of a push."""


def serve(
    agent: Answers,
    *,
    name: str,
    identity: PrivateKey,
    coordinator: PublicKey,
    port: int,
    secret: bytes,
    stop: threading.Event,
) -> None:
    """Answer until told to stop.

    Args:
        agent: Answers.
        name: Name of the site.
        identity: Seals what leaves.
        coordinator: Must have sealed what comes.
        port: Loopback port of the SuperNode's Runtime API.
        secret: Opens it.
        stop: Set to end.
    """
    compat.hasten_pulls()
    address = f"127.0.0.1:{port}"
    app = site_app(agent, name, identity, coordinator)
    executor = compat.executor_client(address, secret)
    wait = _POLL_S
    try:
        while not stop.is_set():
            try:
                task = compat.acquire_site_task(executor, address)
                wait = _POLL_S
            except Exception as error:  # noqa: BLE001 - the SuperNode starts, or starts again
                _log.debug("worker.no_supernode %s", type(error).__name__)
                task, wait = None, min(2 * wait, _MOST_WAIT_S)
            if task is None:
                stop.wait(wait)
            else:
                _answer(app, task)
    finally:
        executor.close()


def _answer(app: ClientApp, task: compat.SiteTask) -> None:
    answered = completed = False
    try:
        message, context, run = task.pull()
        refusal = _foreign(task.kind, run.fab_id)
        if refusal:
            _log.warning("worker.refused run=%s %s", run.run_id, refusal)
            task.reply(Message(Error(compat.REFUSED_APP, refusal), reply_to=message))
            answered = True
            return
        try:
            reply = app(message, context)
        except UpdateRefused as error:
            _log.warning("worker.refused run=%s %s", run.run_id, error)
            reply = Message(Error(compat.FAILED_APP, error.code), reply_to=message)
        except Exception:  # noqa: BLE001 - a code may leave, nothing else
            _log.exception("worker.failed run=%s", run.run_id)
            reply = Message(Error(compat.FAILED_APP, "LF5301"), reply_to=message)
        task.reply(reply)
        answered = completed = True
    except Exception:  # noqa: BLE001 - one message lost, not the site
        _log.exception("worker.message_lost")
    finally:
        if answered:
            task.finish(completed=completed)
        else:
            task.abandon()


def _foreign(kind: str, app: str) -> str:
    if kind != compat.CLIENT_TASK:
        return "this site answers no task of this type"
    if app != APP_ID:
        return "this site runs no app of others"
    return ""


def site_app(agent: Answers, name: str, identity: PrivateKey, coordinator: PublicKey) -> ClientApp:
    """Return the ClientApp that checks the coordinator's seal, asks the agent, and seals.

    Args:
        agent: Answers.
        name: Name of the site.
        identity: Seals what leaves.
        coordinator: Must have sealed what comes.
    """
    app = ClientApp()

    def sealed(answer: Callable[[RecordDict], RecordDict]) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            del context
            purpose = message.metadata.message_type
            nonce = nonce_of(message.content)
            content = Sealing(purpose, COORDINATOR, name, nonce).check(message.content, coordinator)
            reply = answer(content)
            seal = Sealing(f"{purpose} reply", name, COORDINATOR, nonce)
            return Message(seal.seal(reply, identity), reply_to=message)

        return handle

    def asked(content: RecordDict) -> RecordDict:
        return reply_to_record(agent.asked(record_to_ask(content)))

    app.train()(sealed(asked))
    app.evaluate()(sealed(asked))
    app.query("offer")(
        sealed(lambda content: offer_reply_to_record(agent.offered(record_to_offer(content))))
    )
    app.query("phase")(
        sealed(lambda content: phase_reply_to_record(agent.phased(record_to_phase(content))))
    )
    app.query("push")(
        sealed(lambda content: push_reply_to_record(agent.pushed(record_to_push(content))))
    )
    return app
