"""The front page of the session demo: stories as a session orders them, and as the model does.

Why: what a session is worth shows where somebody clicks: a person, or visitors whom the family's
simulator makes up.

Invariants: who clicks is heard through the words of `Runtime.session`, as in any application: what
is shown has an id, and a label names it. The order without a session is that of the same runner's
answers to the same features; no label changes it. A visitor has a session of its own. One thread
answers, one question at a time, so that the microseconds are the runtime's own.

Knows nothing about HTTP, and of visitors nothing but what they click.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from cloud_learner.simulate.page_server import Answer
from edge_runtime.errors import RequestError
from edge_runtime.features.engine import Engine
from edge_runtime.inference.slot import Arm
from edge_runtime.personal.ranking import shifts
from edge_runtime.runtime import Event, Runtime
from edge_runtime.session import Ranked, Session
from edge_runtime.wire.messages import Fields

OFFERED, PLACES = 200, 10
TRIED_BELOW = 0.5  # the chance of what leads is near one, that of any other near nothing
WARM_ROUNDS = 20
KIND = "shown"

Key = Annotated[str, Meta(min_length=1, max_length=64)]
Id = Annotated[str, Meta(max_length=128)]
A = TypeVar("A", bound=Struct)
R = TypeVar("R")


class Asked(Struct, forbid_unknown_fields=True):
    """Whose session it is."""

    key: Key


class Clicked(Asked):
    """The answer that was clicked, and those above it that were passed over."""

    id: Id
    passed: Annotated[list[Id], Meta(max_length=PLACES)]


class Visited(Struct, forbid_unknown_fields=True):
    """A page of a simulated visitor, who is a number."""

    visitor: Annotated[int, Meta(ge=0, lt=1 << 53)]
    page: Annotated[int, Meta(ge=0)]


class Story(Struct):
    """A story in its place; `tried`: it stands there by chance, so that something is learned."""

    story: int
    title: str
    genres: list[str]
    model_place: int
    id: str = ""
    tried: bool = False
    clicked: bool = False


class Genre(Struct):
    """How much further its stories move than all of the offer, on average."""

    name: str
    shift: float


class View(Struct):
    """What the page shows: two orders of `stories`, what they cost, and what was learned so far:
    by how much all stories move, and those of a genre beyond that.
    """

    stories: int
    pages: int
    shown: list[Story]
    model: list[Story]
    rank_us: float
    label_us: list[float] = []
    labels: int = 0
    falls: int = 0
    shift: float = 0.0
    genres: list[Genre] = []


class Offer:
    """Stories to choose from, at an hour: `features` and `embeddings` have a row for each; `order`
    is the model's.
    """

    def __init__(self, stories: Sequence[int], hour: int, arm: Arm, engine: Engine) -> None:
        self.stories, self.hour = list(stories), hour
        self.candidates: list[Fields] = [{"item": story} for story in stories]
        self.features = np.stack(
            [engine.vector(0.0, {"hour": hour, **each}) for each in self.candidates]
        )
        self.embeddings, answers = arm.runner.embed(self.features)
        self.order = [self.stories[at] for at in np.argsort(-answers[:, 0], kind="stable")]
        self.places = {story: place for place, story in enumerate(self.order, 1)}


class FrontPage:
    """Answers what the page asks. `simulator` is the family's module; `headlines` gives each of its
    stories a title, by the genres that it has.
    """

    def __init__(
        self, runtime: Runtime, simulator: Any, headlines: Callable[[list[list[str]]], list[str]]
    ) -> None:
        self._runtime, self._family = runtime, runtime.families[0]
        self._simulator, self._world = simulator, simulator.World.drawn()
        self._genres = [self._world.genres(story) for story in range(simulator.STORIES)]
        self._titles = headlines(self._genres)
        self._arm = runtime.resident(self._family)[0]
        assert self._arm.info is not None
        self._engine = Engine(self._arm.info.spec)
        self._offers: dict[int, Offer] = {}
        self._one = ThreadPoolExecutor(1)
        self._one.submit(self._warm).result()

    def answers(self) -> dict[str, Answer]:
        """By name, what the page may ask."""
        return {
            "rank": self._answer(Asked, self.rank),
            "click": self._answer(Clicked, self.click),
            "reset": self._answer(Asked, self.reset),
            "close": self._answer(Asked, self.close),
            "visit": self._answer(Visited, self.visit),
        }

    def _answer(self, kind: type[A], method: Callable[[A], View | None]) -> Answer:
        decode = msgspec.json.Decoder(kind).decode

        def answer(body: bytes) -> bytes:
            try:
                asked = decode(body)
            except msgspec.MsgspecError as error:
                raise RequestError("bad_request", f"{error}; nothing was changed") from None
            return self._one.submit(lambda: msgspec.json.encode(method(asked))).result()

        return answer

    def rank(self, asked: Asked) -> View:
        """What a session makes of the stories now."""
        hour = datetime.now().astimezone().hour
        if hour not in self._offers:
            self._offers[hour] = Offer(range(OFFERED), hour, self._arm, self._engine)
        session, offer = self._session(asked.key), self._offers[hour]
        view = self._page(session, offer, "somebody", PLACES)
        return self._learned(view, session, offer)

    def click(self, clicked: Clicked) -> View:
        """Learn that a story was clicked and others were not. Raises: RequestError, as a label."""
        told = [(each, 0.0) for each in clicked.passed] + [(clicked.id, 1.0)]
        label_us = _label(self._session(clicked.key), told)
        view = self.rank(clicked)
        view.label_us = label_us
        return view

    def reset(self, asked: Asked) -> View:
        """Begin the session anew."""
        self._session(asked.key).reset()
        return self.rank(asked)

    def close(self, asked: Asked) -> None:
        """Forget the session."""
        self._session(asked.key).close()

    def visit(self, visited: Visited) -> View:
        """Let a visitor see a page, both ways, and click; the view is that page."""
        simulator, page = self._simulator, visited.page
        if page >= simulator.PAGES:
            raise RequestError("bad_request", f"a visit has {simulator.PAGES} pages, from 0")
        visit = simulator.Visit(self._world, visited.visitor)
        offer = Offer(visit.offers[page].tolist(), visit.hour, self._arm, self._engine)
        session = self._session(f"visitor {visited.visitor}")
        view = self._page(session, offer, visit.id, simulator.PLACES)
        _click(visit, page, view.model)
        view.label_us = _label(session, _click(visit, page, view.shown))
        self._learned(view, session, offer)
        if page == simulator.PAGES - 1:
            session.close()
        return view

    def _session(self, key: str) -> Session:
        return self._runtime.session(self._family, key)

    def _page(self, session: Session, offer: Offer, visit: str, places: int) -> View:
        event = Event(KIND, time.time(), {"visit": visit, "hour": offer.hour})
        asked = event, offer.candidates, places, offer.features
        ranked, rank_us = _timed(lambda: session.rank(*asked))
        shown = [self._story(offer, offer.stories[each.index], each) for each in ranked]
        model = [self._story(offer, story) for story in offer.order[:places]]
        return View(len(offer.stories), self._simulator.PAGES, shown, model, rank_us)

    def _story(self, offer: Offer, story: int, ranked: Ranked | None = None) -> Story:
        found = Story(story, self._titles[story], self._genres[story], offer.places[story])
        if ranked is not None:
            found.id, found.tried = ranked.id, ranked.chance < TRIED_BELOW
        return found

    def _learned(self, view: View, session: Session, offer: Offer) -> View:
        """The view, with what the session has learned by now."""
        explained = session.explain()
        view.labels, view.falls = explained.labels, explained.falls
        head = self._runtime.adapting.visitor(self._family, session.key).head(self._arm)
        if head is not None:
            moved = shifts(head, offer.embeddings)
            view.shift = float(moved.mean())
            view.genres = [
                Genre(name, float(moved[rows].mean()) - view.shift)
                for name in self._simulator.GENRES
                if (rows := [at for at, n in enumerate(offer.stories) if name in self._genres[n]])
            ]
        return view

    def _warm(self) -> None:
        """What is asked for the first time takes longest; nobody should see that."""
        for _ in range(WARM_ROUNDS):
            view = self.rank(Asked("warm"))
            self.click(Clicked("warm", view.shown[-1].id, [each.id for each in view.shown[:-1]]))
        self._session("warm").close()


def _label(session: Session, told: list[tuple[str, float]]) -> list[float]:
    """Say what was clicked; the microseconds of each label."""
    return [_timed(partial(session.label, *each))[1] for each in told]


def _click(visit: Any, page: int, stories: list[Story]) -> list[tuple[str, float]]:
    """Mark what the visitor clicks; ids and labels of what was looked at."""
    clicks = visit.clicks(page, [each.story for each in stories])
    for story, clicked in zip(stories, clicks, strict=False):
        story.clicked = clicked
    return [(story.id, float(each)) for story, each in zip(stories, clicks, strict=False)]


def _timed(call: Callable[[], R]) -> tuple[R, float]:
    """What a call gives, and its microseconds."""
    began_ns = time.perf_counter_ns()
    found = call()
    return found, (time.perf_counter_ns() - began_ns) / 1000
