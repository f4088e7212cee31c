"""Simulated visitors of a page of stories: what they like, how far they look, what they click.

Why: what a session is worth can only be told where somebody reacts to what is shown; a file of past
clicks says nothing of what was not shown.

A visitor is nobody: no name, no past. Tastes, in genres and in a style that no genre names, are
drawn for each visit, and move on with every page (Ornstein and Uhlenbeck 1930). Some genres are
liked more at some hours, by everybody. A page is looked at from the top down, for as far as the
visitor's patience goes. The log odds of a click are the sum of all this; what was not looked at is
neither clicked nor refused.

Invariants: the same seed gives the same world, and the same visit whatever is shown in it: all that
is left to chance is drawn before the first page, so two rankings are tried on the same visitors. No
story is offered twice within a visit.

Knows nothing about models, features or rankings. What is assumed stands in README.md with reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

GENRES: Final = ("comedy", "cooking", "games", "music", "news", "science", "sport", "travel")
STORIES, STYLES = 400, 4
PAGES, PLACES = 10, 8
OFFERED = STORIES // PAGES
TWO_GENRES = 0.4  # the share of the stories
GOES_ON = 0.85  # from one story of a page to the next
LASTS = 0.95  # of a taste, from one page to the next
CLICK = -2.2  # log odds, of a story that is nothing special
QUALITY, HOUR, GENRE, STYLE = 0.6, 0.4, 1.2, 0.6  # deviations of what is added to them


@dataclass(frozen=True)
class World:
    """What is true of the stories, and nobody is told but of the genres.

    `facts` (stories, genres + styles) is what tastes are in, `liked` (24, stories) what everybody
    makes of a story at an hour, in log odds.
    """

    facts: Floats
    liked: Floats

    @classmethod
    def drawn(cls, seed: int = 1) -> World:
        """The world of a seed."""
        chance = np.random.default_rng(seed)
        genres = np.zeros((STORIES, len(GENRES)))
        for story in genres:
            story[chance.choice(len(GENRES), 1 + int(chance.random() < TWO_GENRES), False)] = 1
        peaks = chance.uniform(0, 24, len(GENRES))
        waves = np.sqrt(2) * HOUR * np.cos((np.arange(24)[:, None] - peaks) * np.pi / 12)
        liked = CLICK + chance.normal(0, QUALITY, STORIES) + waves @ genres.T
        return cls(np.hstack([genres, chance.normal(0, 1, (STORIES, STYLES))]), liked)

    def genres(self, story: int) -> list[str]:
        """One or two of `GENRES`."""
        return [GENRES[n] for n in np.flatnonzero(self.facts[story, : len(GENRES)])]


class Visit:
    """One visitor: `offers` (pages, stories) are what there is to choose from on each page.

    `id` is random, as a site would make it up; `chances` (stories,) are known to nobody.
    """

    def __init__(self, world: World, seed: int | Sequence[int]) -> None:
        chance = np.random.default_rng(seed)
        self.id = chance.bytes(8).hex()
        self.hour = int(chance.integers(24))
        self.offers = chance.permutation(STORIES).reshape(PAGES, OFFERED)
        self._depths = np.minimum(chance.geometric(1 - GOES_ON, PAGES), PLACES)
        odds = world.liked[self.hour].copy()
        for tastes, offer in zip(_tastes(chance), self.offers, strict=True):
            odds[offer] += world.facts[offer] @ tastes
        self.chances = 1 / (1 + np.exp(-odds))
        self._wanted = chance.random(STORIES) < self.chances

    def clicks(self, page: int, shown: Sequence[int]) -> list[bool]:
        """Whether each story of `shown` is clicked that is looked at: the first ones, in order."""
        return self._wanted[list(shown[: self._depths[page]])].tolist()


def _tastes(chance: np.random.Generator) -> Floats:
    """The tastes on each page, (pages, genres + styles)."""
    spread = np.repeat([GENRE, STYLE], [len(GENRES), STYLES])
    tastes = chance.normal(0, spread, (PAGES, len(spread)))
    for page in range(1, PAGES):
        tastes[page] = LASTS * tastes[page - 1] + np.sqrt(1 - LASTS**2) * tastes[page]
    return tastes
