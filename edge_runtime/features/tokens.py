"""Tokens: a text as a row of numbers, by the tokenizer that travels in the package.

Why: a model reads texts as the ids of one tokenizer, and any other makes nonsense of them. So the
tokenizer is part of the feature spec, and device and learner run it here.

Invariants: the same text gives the same ids everywhere: as many as a feature has columns, each
below `size`. What is too long is cut before the ids that mark its end. Any text that UTF-8 can
carry gives some, and in bounded time: what of it is read is bounded. Encoders that are equal are in
memory once.

The one home of the `tokenizers` library, which is loaded when a spec first asks for it: a device
that reads no texts needs no extra. Knows nothing about events and models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from edge_runtime.errors import ConfigError, HeadwaterError, PackageError

_ODD = "\x00 a\u0301 \u6f22 \U0001f600 \ue000 " + "x" * 300
"""Something of what people send; a tokenizer that cannot say 'unknown' fails at it."""


CHARACTERS_PER_ID = 8
"""What is read of a text, for each id that it may have; an id of English has four or five."""

WORD_MAX = 32
"""A longer word is unknown to WordPiece, whose work grows with the square of a word's length."""


class Encoder:
    """Texts as `length` ids, from 0 to `size` - 1; `pad` fills up behind the last of them.

    Raises: ConfigError (missing_extra, bad_tokenizer).
    """

    def __init__(self, tokenizer: str, length: int) -> None:
        library = _library()
        with _refused():
            made = library.Tokenizer.from_str(tokenizer)
            self.size: int = made.get_vocab_size()
            self.pad = _pad_of(made)
            _check_ids(made, self.size)
            _set_up(made, length)
            self._encode = made.encode
            marks, odd = self._encode("").ids, self._encode(_ODD).ids
            if not marks or self.pad in (*marks, *odd):
                raise _bad(
                    "an empty text must have an id, and no text that of the padding",
                    "give it a post-processor that marks where a text begins or ends",
                )
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
        return ids + self._padding[len(ids) :]


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


def _check_ids(tokenizer: Any, size: int) -> None:
    gap = next((each for each in range(size) if tokenizer.id_to_token(each) is None), None)
    if gap is not None:
        raise _bad(f"it has {size} tokens, but none with the id {gap}")


def _set_up(tokenizer: Any, length: int) -> None:
    """Let it cut texts at `length`, fill up none, and give up long words."""
    shortest = tokenizer.num_special_tokens_to_add(is_pair=False) + 1
    if length < shortest:
        raise _bad(f"a text takes {shortest} ids at least, and length is {length}")
    model = tokenizer.model
    if hasattr(model, "max_input_chars_per_word"):
        model.max_input_chars_per_word = min(WORD_MAX, model.max_input_chars_per_word)
    tokenizer.encode_special_tokens = True  # else who writes [SEP] would end the text
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)


def _bad(why: str, hint: str = "") -> ConfigError:
    return ConfigError("bad_tokenizer", why, hint)
