"""Questions that wait for their answers, and how each of them ends.

Why: an answer may never come, come late, or be refused in a report that names no question; none of
that may leave anything behind.

Invariants: every question ends, by its answer, its deadline, a refusal, or the loss of the link,
whichever is first; a later end changes nothing. One that ended is no longer kept.

Knows nothing about connections.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from edge_runtime.errors import HeadwaterError, TransportError


class Question:
    """A request on its way; await `answer` or call `forget`."""

    def __init__(self, book: Questions, subject: str, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.subject = subject
        self.token = str(next(book.tokens))
        self._book = book
        self._end: asyncio.Future[Any] = loop.create_future()
        late = TransportError("timeout", f"no answer on {subject} within {timeout_s:.3g} s")
        self._timer = loop.call_later(timeout_s, self.settle, late)
        book.open[self.token] = self

    async def answer(self) -> Any:
        """The raw reply. Raises: TransportError `timeout`, `unreachable`, `not_allowed`."""
        try:
            reply = await self._end
        finally:
            self.forget()
        if isinstance(reply, HeadwaterError):
            raise reply
        return reply

    def settle(self, reply: Any) -> None:
        """End it, by an answer or by the error that is raised in its place."""
        if not self._end.done():
            self._end.set_result(reply)

    def forget(self) -> None:
        """Nobody waits for it any more."""
        self._timer.cancel()
        self._end.cancel()
        self._book.open.pop(self.token, None)


class Questions:
    """The questions of one link, by their tokens."""

    def __init__(self) -> None:
        self.tokens = itertools.count()
        self.open: dict[str, Question] = {}

    def ask(self, subject: str, timeout_s: float) -> Question:
        """A new question; its deadline starts now."""
        return Question(self, subject, timeout_s)

    def answered(self, token: str, reply: Any) -> None:
        """An answer came; nobody may be waiting for it any more."""
        if question := self.open.get(token):
            question.settle(reply)

    def refused(self, subject: str, error: TransportError) -> None:
        """End all questions on a subject, given in small letters."""
        for question in list(self.open.values()):
            if question.subject.lower() == subject:
                question.settle(error)

    def fail(self, error: TransportError) -> None:
        """End all questions."""
        for question in list(self.open.values()):
            question.settle(error)
