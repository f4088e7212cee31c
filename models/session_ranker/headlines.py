"""Headlines for the stories of the simulated world, so that a person has something to choose from.

All of it is invented. A headline has its subject from the first genre of a story, and what becomes
of it from the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SUBJECTS = {
    "comedy": (
        "A clown without a circus",
        "The town's worst joke",
        "A puppet theatre",
        "The man who laughs last",
        "A sketch about queues",
        "The ventriloquist's neighbour",
        "An imitator of parrots",
    ),
    "cooking": (
        "A bakery on a barge",
        "Grandmother's plum cake",
        "The last noodle stall",
        "A soup of seven roots",
        "The village cheese",
        "A cook who cannot smell",
        "The pepper mill of the inn",
    ),
    "games": (
        "A chess club in a cellar",
        "The island's card game",
        "A puzzle without a picture",
        "The night of the board games",
        "An arcade from 1983",
        "A game of six pieces",
        "The oldest pinball machine",
    ),
    "music": (
        "A choir of bus drivers",
        "The organ of the old mill",
        "A tune for three saws",
        "The brass band of the harbour",
        "A forgotten lullaby",
        "The drummer next door",
        "A piano on the beach",
    ),
    "news": (
        "The bridge of the lower town",
        "A strike of the ferrymen",
        "The new night bus",
        "A vote about a tree",
        "The market hall",
        "A road that leads nowhere",
        "The clock of the town hall",
    ),
    "science": (
        "A moss that counts days",
        "The telescope on the roof",
        "A beetle with two clocks",
        "The coldest laboratory",
        "A stone from the sea floor",
        "The school's weather balloon",
        "A river that runs both ways",
    ),
    "sport": (
        "A rowing crew of seventy",
        "The smallest football club",
        "A marathon by night",
        "The goalkeeper's left glove",
        "A swimmer from the hills",
        "The wrestling sisters",
        "The cyclist without brakes",
    ),
    "travel": (
        "A train with one carriage",
        "The pass above the clouds",
        "A ferry to three islands",
        "The longest tram line",
        "A hut behind the glacier",
        "The road of the salt carriers",
        "The sleeper to the north",
    ),
}

FATES = {
    "comedy": (
        "makes a whole town laugh",
        "becomes a running gag",
        "is played by two fools",
        "slips on a banana skin",
        "gets a comic of its own",
        "is funnier than its mayor",
        "cannot stop giggling",
    ),
    "cooking": (
        "gives away a recipe",
        "tastes best on Mondays",
        "opens a kitchen for all",
        "is served with dill",
        "bakes bread for the winter",
        "needs a pinch of salt",
        "feeds four hundred",
    ),
    "games": (
        "turns into a board game",
        "is played by thousands",
        "starts at level nine",
        "cheats, and says so",
        "has a riddle in it",
        "wins without a move",
        "rolls nothing but sixes",
    ),
    "music": (
        "gets an anthem",
        "sounds better in the rain",
        "fills the concert hall",
        "hums in B flat",
        "finds its second voice",
        "goes on tour",
        "plays until morning",
    ),
    "news": (
        "is before the council",
        "divides the town",
        "opens a year late",
        "has to move",
        "is saved by one vote",
        "costs twice as much",
        "is closed for repair",
    ),
    "science": (
        "puzzles the researchers",
        "explains the tides",
        "is measured anew",
        "glows under red light",
        "proves an old guess right",
        "is older than was thought",
        "follows an unknown law",
    ),
    "sport": (
        "wins in overtime",
        "trains before sunrise",
        "is up one league",
        "loses, and celebrates",
        "breaks the record",
        "meets its old rival",
        "runs its last race",
    ),
    "travel": (
        "is worth the detour",
        "goes round the world",
        "stops where nobody lives",
        "follows the old coast road",
        "crosses four borders",
        "leaves at a quarter to five",
        "arrives a day early",
    ),
}


def headlines(genres: Sequence[Sequence[str]]) -> list[str]:
    """One for each story, by the genres that it has; no two are alike."""
    told: Counter[tuple[str, str]] = Counter()
    found = []
    for own in genres:
        subjects, fates = SUBJECTS[own[0]], FATES[own[-1]]
        turn, at = divmod(told[own[0], own[-1]], len(subjects))
        told[own[0], own[-1]] += 1
        first = list(FATES).index(own[-1])  # so that not every pair begins with the same subject
        found.append(f"{subjects[(first + at) % len(subjects)]} {fates[(at + turn) % len(fates)]}")
    return found
