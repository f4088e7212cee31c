"""A look at an operator's server configuration, for what would break this system or lose its data.

Why: a broker of one's own is configured by hand. One of its switches changes the subject on which
messages are acknowledged, and client libraries that do not know it stop reading without a word.

Invariants: reads, and follows includes; changes nothing. What it refuses is an error; what only
weakens a promise is a sentence.

Knows the server's configuration language no further than words, texts, comments and brackets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import ConfigError

_TOKEN = re.compile(
    r'"(?P<quoted>(?:\\.|[^"\\])*)"|\'(?P<single>[^\']*)\'|(?P<comment>#[^\n]*|//[^\n]*)'
    r"|(?P<word>[^\s{}\[\](),:=;\"'#]+(?:://[^\s{}\[\](),;\"'#]+)?)|(?P<mark>[{}\[\](),:=;])"
)
_OFF = {"false", "no", "off"}
_ENDS = set("}]),;")
_INCLUDES_MAX = 16


def check(path: Path) -> list[str]:
    """What in the configuration at `path` weakens a promise, one sentence each.

    Raises: ConfigError (unreadable_config; ack_v2: it switches `js_ack_fc_v2` on).
    """
    pairs = list(_pairs(list(_words(path, 0))))
    values = dict(pairs)
    switched = [
        value for key, value in pairs if key == "js_ack_fc_v2" and value.lower() not in _OFF
    ]
    if switched:
        raise ConfigError(
            "ack_v2",
            f"{path}: js_ack_fc_v2 is {switched[0]}",
            "write feature_flags { js_ack_fc_v2: false }: client libraries in use here, and what"
            " they are replaced by while an upgrade runs, read the older form",
        )
    found = []
    if "js_ack_fc_v2" not in values:
        found.append("js_ack_fc_v2 is not named: write false, before a release makes it true")
    if values.get("sync_interval") != "always":
        found.append("sync_interval is not always: a power cut may take what was acknowledged")
    if "accounts" not in values and "authorization" not in values:
        found.append("nobody needs a key: include what cloud-learner broker-config prints")
    return found


def _words(path: Path, depth: int) -> Iterator[str]:
    """All words, texts and marks, those of included files in their place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("unreadable_config", f"{path}: {error}") from error
    include = False
    for match in _TOKEN.finditer(text):
        if match["comment"] is not None:
            continue
        word = next(each for each in match.group("quoted", "single", "word", "mark") if each)
        if include and depth < _INCLUDES_MAX:
            yield from _words(path.parent / word, depth + 1)
        elif word != "include" or match["word"] is None:
            yield word
        include = word == "include" and match["word"] is not None


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    """Each key with its value, or with the bracket that begins it."""
    meant = [word for word in words if word not in (":", "=")]
    after = zip((word.lower() for word in meant), meant[1:], strict=False)
    return ((key, value) for key, value in after if value not in _ENDS)
