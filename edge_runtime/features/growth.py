"""Growth: how many characters a tokenizer's steps can make of one, before its model reads them.

Why: a text is bounded, but forty steps that each write "qq" for "q" ask for terabytes at the first
q, and end the process that the allocator fails in.

Invariants: never less than what can happen. Steps that follow each other multiply.

Knows nothing about the library: a step is what stands in the JSON of a tokenizer.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

GROWTH_MAX = 4096.0
"""Those of ALBERT, the most of any tokenizer that is in common use, come to 2,592."""

_OF_KINDS = {
    "BertNormalizer": 8.0,  # decomposed, then in small letters; or a space on either side
    "ByteLevel": 4.0,  # a character for each byte of UTF-8
    "Lowercase": 2.0,
    "Metaspace": 2.0,  # a mark before each word
    "NFC": 3.0,
    "NFD": 4.0,
    "NFKC": 18.0,  # U+FDFA is a sentence
    "NFKD": 18.0,
}


def growth(step: Mapping[str, Any] | None) -> float:
    """The most characters of a normalizer or pre-tokenizer, or of all within it, for one."""
    match step:
        case {"normalizers": [*steps]} | {"pretokenizers": [*steps]}:
            return math.prod(map(growth, steps))
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return max(1.0, len(new) / len(old))
        case {"type": "Replace", "content": str(new)} | {"type": "Prepend", "prepend": str(new)}:
            return 1.0 + len(new)  # a pattern may match the nothing before each character
        case {"type": "Precompiled", "precompiled_charsmap": str(table)}:
            return _longest(base64.b64decode(table))
        case {"type": str(kind)}:
            return _OF_KINDS.get(kind, 1.0)
    return 1.0


def _longest(table: bytes) -> float:
    """The longest of what a table of SentencePiece writes: texts that end with 0, behind a trie
    whose length stands before it.
    """
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return float(max(len(text.decode(errors="replace")) for text in texts.split(b"\0")))
