"""Tokens: a text as a row of numbers, by the tokenizer that travels in the package.

Why: a model reads texts as the ids of one tokenizer, and any other makes nonsense of them. So the
tokenizer is part of the feature spec, and device and learner run it here.

Invariants: the same text gives the same ids everywhere: as many as a feature has columns, each
below `size`. The marks of a text, and what fills up behind them, come out of no text itself. What
is too long is cut before the ids that mark its end. Any text that UTF-8 can carry gives some, and
in bounded time: what of it is read is bounded, and what a tokenizer may make of it. Encoders that
are equal are in memory once.

The one home of the `tokenizers` library, which is loaded when a spec first asks for it: a device
that reads no texts needs no extra. Knows nothing about events and models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from edge_runtime.errors import ConfigError, HeadwaterError, PackageError
from edge_runtime.features.growth import GROWTH_MAX, growth

ODD = "\0 a\u0301 \u6f22 \U0001f600 \ue000 " + "x" * 300
ODD += " \u0130\xdf\xbd\ufdfa\u01c5 I'LL-don't,4.2%[SEP]</s> \ud55c\u1112\u1161\u11ab\u200d\ufe0f"
"""Something of what people send; a tokenizer that cannot say 'unknown' fails at it, and libraries
that differ show it.
"""

CHARACTERS_PER_ID = 8
"""What is read of a text, for each id that it may have; an id of English has four or five."""

WORD_MAX = 32
"""A longer word is unknown to WordPiece, whose work grows with the square of a word's length."""


class Encoder:
    """Texts as `length` ids, from 0 to `size` - 1; `pad` fills up behind the last of them. `digest`
    is that of the ids of an odd text: the same wherever the library reads texts alike.

    Raises: ConfigError (missing_extra, bad_tokenizer).
    """

    def __init__(self, tokenizer: str, length: int) -> None:
        library = _library()
        with _refused():
            made = library.Tokenizer.from_str(tokenizer)
            self.size: int = made.get_vocab_size()
            self.pad = _pad_of(made)
            _check_steps(made)
            _set_up(made)
            self._begin, self._end = _marks_of(made, length)
        marks = {*self._begin, *self._end}
        _check_ids(made, self.size, self.pad, marks)
        self._encode = made.encode
        self.digest = hashlib.sha256(repr(made.encode(ODD).ids).encode()).hexdigest()[:16]
        self._reserved = marks | {self.pad}
        self._room = length - len(self._begin) - len(self._end)
        self._padding = [self.pad] * length
        self._characters = CHARACTERS_PER_ID * length

    def __call__(self, text: str) -> list[int]:
        """The ids of a text. Raises: PackageError `run_failed`."""
        try:
            ids: list[int] = self._encode(text[: self._characters]).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise PackageError("run_failed", f"the tokenizer fails at a text: {error}") from error
        if not self._reserved.isdisjoint(ids):
            ids = [each for each in ids if each not in self._reserved]
        row = self._begin + ids[: self._room] + self._end
        return row + self._padding[len(row) :]


_encoders: WeakValueDictionary[tuple[bytes, int], Encoder] = WeakValueDictionary()


def encoder(tokenizer: str, length: int) -> Encoder:
    """The encoder of a tokenizer's JSON; the same one for as long as somebody holds it.

    Raises: ConfigError (missing_extra, bad_tokenizer).
    """
    key = hashlib.sha256(tokenizer.encode("utf-8", "surrogatepass")).digest(), length
    found = _encoders.get(key)
    if found is None:
        found = _encoders[key] = Encoder(tokenizer, length)
    return found


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "missing_extra",
            f"texts are read with the library tokenizers, which is not here: {error}",
            "pip install 'headwater[text]'",
        ) from error
    return tokenizers


@contextmanager
def _refused() -> Iterator[None]:
    """What the library raises, as an error of ours; what panics there is no Exception."""
    try:
        yield
    except (HeadwaterError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _bad(f"it cannot be used: {error}") from error


def _pad_of(tokenizer: Any) -> int:
    """The id that its own padding names, or else that of the usual names."""
    told = tokenizer.padding
    if told is not None:
        return int(told["pad_id"])
    for name in ("[PAD]", "<pad>"):
        found: int | None = tokenizer.token_to_id(name)
        if found is not None:
            return found
    raise _bad("it names no padding", "give it a token [PAD] or <pad>")


def _check_steps(tokenizer: Any) -> None:
    steps = tokenizer.normalizer, tokenizer.pre_tokenizer
    grown = math.prod(growth(json.loads(each.__getstate__())) for each in steps if each is not None)
    if grown > GROWTH_MAX:
        raise _bad(
            f"it may make {grown:.6g} characters of one, more than {GROWTH_MAX:,.0f}",
            "leave out steps that write more than they read",
        )
    model = tokenizer.model
    drawn = getattr(model, "alpha", None), getattr(model, "nbest_size", None)
    if getattr(model, "dropout", None) or drawn != (None, None):
        raise _bad("it draws ids by chance", "give it a model without dropout and sampling")


def _set_up(tokenizer: Any) -> None:
    """Let it give all ids of a text, fill up none, and give up long words."""
    model = tokenizer.model
    if hasattr(model, "max_input_chars_per_word"):
        model.max_input_chars_per_word = min(WORD_MAX, model.max_input_chars_per_word)
    tokenizer.encode_special_tokens = True  # else who writes [SEP] would end the text
    tokenizer.no_padding()
    tokenizer.no_truncation()


def _marks_of(tokenizer: Any, length: int) -> tuple[list[int], list[int]]:
    """The ids that stand before a text and behind it; it gives a text's own alone from now on."""
    whole, marks = tokenizer.encode(ODD).ids, tokenizer.encode("").ids
    if not marks:
        hint = "give it a post-processor that marks where a text begins or ends"
        raise _bad("an empty text must have an id", hint)
    if length <= len(marks):
        raise _bad(f"a text takes {len(marks) + 1} ids at least, and length is {length}")
    tokenizer.post_processor = None
    inner = tokenizer.encode(ODD).ids
    for at in range(len(marks) + 1):
        if whole == marks[:at] + inner + marks[at:]:
            return marks[:at], marks[at:]
    raise _bad("its post-processor gives a text otherwise than once, between the same marks")


def _check_ids(tokenizer: Any, size: int, pad: int, marks: set[int]) -> None:
    gap = next((each for each in range(size) if tokenizer.id_to_token(each) is None), None)
    if gap is not None:
        raise _bad(f"it has {size} tokens, but none with the id {gap}")
    beyond = max(pad, *marks)
    if beyond >= size:
        raise _bad(f"it has {size} tokens, and pads or marks with the id {beyond}")
    if pad in marks:
        raise _bad(f"it pads with the id {pad}, which is a mark, too", "give it a token [PAD]")


def _bad(why: str, hint: str = "") -> ConfigError:
    return ConfigError("bad_tokenizer", why, hint)
