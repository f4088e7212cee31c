"""Questions between processes of the cloud: one asks over the bus, another answers.

Why: the gate is a process of its own; whoever wants a verdict or a signature has to ask for it, and
must outlive a gate that is away, slow or killed while it works.

Invariants: a question is sent again until it is answered or its time is over; who answers does the
work of a question once, however often it comes, for as long as it remembers it. An answer goes to a
subject that only the asker's random token names. What is refused comes back as the error it was.

Knows nothing about what is asked. Implements proto/asyncapi.yaml (gate, submit, answer).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import msgspec

from cloud_learner.packed import decoded, encoded
from edge_runtime.bus.base import Bus, Message, Subscription
from edge_runtime.errors import HeadwaterError, RequestError, TransportError
from edge_runtime.wire import subjects

QUESTION_VERSION = 1
AGAIN_S = 1.0
REMEMBERED = 32

_AWAY = {"no_answer", "unreachable", "timeout"}  # of somebody further on
_TOKEN = re.compile(r"[0-9a-f]{32}")
Work = Callable[[Message, bytes], Awaitable[bytes]]

log = logging.getLogger("cloud_learner")


class Question(msgspec.Struct, array_like=True):
    """A question; `asker` says where the answer goes."""

    version: int
    id: str
    asker: str
    body: bytes


class Answer(msgspec.Struct, array_like=True):
    """What came of it: `code` is empty, or that of the error, with its words."""

    version: int
    id: str
    code: str
    message: str
    hint: str
    body: bytes


class Asker:
    """Asks over `bus`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._token = secrets.token_hex(16)
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._subscription: Subscription | None = None

    async def ask(self, subject: str, body: bytes, *, wait_s: float) -> bytes:
        """The answer's body.

        Raises: RequestError with the code of a refusal; TransportError `no_answer`.
        """
        if self._subscription is None:
            self._subscription = await self._bus.subscribe(subjects.answer(self._token), self._hear)
        question = Question(QUESTION_VERSION, secrets.token_hex(16), self._token, body)
        future = self._waiting[question.id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(wait_s):
                answer = await self._answered(subject, encoded(question), future)
        except TimeoutError as error:
            why = f"{subject} was asked for {wait_s:g} s without an answer"
            raise TransportError("no_answer", why, "is that process running?") from error
        finally:
            del self._waiting[question.id]
        if answer.code:
            kind = TransportError if answer.code in _AWAY else RequestError
            raise kind(answer.code, answer.message, answer.hint)
        return answer.body

    async def close(self) -> None:
        """Listen no more."""
        if self._subscription is not None:
            await self._subscription.close()

    async def _answered(self, subject: str, data: bytes, future: asyncio.Future[Answer]) -> Answer:
        while True:
            with contextlib.suppress(TransportError):  # sent again in a moment
                await self._bus.send(subject, data)
            done, _ = await asyncio.wait([future], timeout=AGAIN_S)
            if done:
                return future.result()

    async def _hear(self, message: Message) -> None:
        answer = decoded(message.data, Answer)
        future = self._waiting.get(answer.id)
        if future is not None and not future.done():
            future.set_result(answer)


class Answerer:
    """Answers the questions on one subject with what `work` makes of each."""

    def __init__(self, bus: Bus, work: Work) -> None:
        self._bus, self._work = bus, work
        self._known: OrderedDict[str, Answer] = OrderedDict()

    async def hear(self, message: Message) -> None:
        """What a subscription calls back. Raises: RequestError when it is no question."""
        question = decoded(message.data, Question)
        if question.version != QUESTION_VERSION or not _TOKEN.fullmatch(question.asker):
            raise RequestError("bad_question", f"a question on {message.subject} is none of ours")
        if question.id not in self._known:
            self._known[question.id] = await self._answer(message, question)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        with contextlib.suppress(TransportError):  # asked again in a moment
            answer = self._known[question.id]
            await self._bus.send(subjects.answer(question.asker), encoded(answer))

    async def _answer(self, message: Message, question: Question) -> Answer:
        try:
            body = await self._work(message, question.body)
        except HeadwaterError as error:
            log.warning("%s is refused: %s", message.subject, error)
            facts = error.code, error.message, error.hint
            return Answer(QUESTION_VERSION, question.id, *facts, b"")
        return Answer(QUESTION_VERSION, question.id, "", "", "", body)
