"""Metadata and packages that were mutated, replayed, mixed or cut: none accepted, none a crash.

Each attack is drawn from its own seed, which a failure prints: run `attack(SEED)` again.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime.errors import HeadwaterError

COUNT = pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
META, BLOB = "hw.meta.", "hw.blob."
DEEP = 20_000
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, "", "x", [], {}, [[]], [{}]),
    *("../../../x", "/etc/passwd", "a\0b", "\ud800", "root", "targets", "é" * 300, "9" * 5000),
    *({"": {}}, ["../x"], {"sha256": ""}, {"sha256": "ab" * 32}, "2999-01-01T00:00:00Z", "1970"),
]

Files = dict[str, bytes]
Mutate = Callable[[random.Random, SimpleNamespace, Files, str], bytes]


def flipped(chance: random.Random, _: Any, files: Files, name: str) -> bytes:
    data = bytearray(files[name])
    for _turn in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(chance: random.Random, _: Any, files: Files, name: str) -> bytes:
    data = files[name]
    at = chance.randrange(len(data))
    return chance.choice([data[:at], data[at:], b"", data[:at] + bytes(len(data) - at)])


def lengthened(chance: random.Random, _: Any, files: Files, name: str) -> bytes:
    more = chance.choice([b" ", b"\0", b"}", b"{}", files[name], b" " * 700_000, b"x" * 131_072])
    return chance.choice([files[name] + more, more + files[name]])


def spliced(chance: random.Random, history: Any, files: Files, name: str) -> bytes:
    other = a_genuine(chance, history, name)
    return files[name][: chance.randrange(len(files[name]))] + other[chance.randrange(len(other)) :]


def exchanged(chance: random.Random, history: Any, _: Files, name: str) -> bytes:
    return a_genuine(chance, history, name)


def a_genuine(chance: random.Random, history: Any, like: str) -> bytes:
    """Some genuine file of the same kind: metadata or blob, of any publication."""
    state = chance.choice(history.states)
    return state[chance.choice([each for each in state if each[:8] == like[:8]])]


def bent(chance: random.Random, _: Any, files: Files, name: str) -> bytes:
    """The JSON with a field changed, removed, doubled or moved, and written anew."""
    try:
        document = json.loads(files[name])
    except ValueError:
        return files[name][::-1]
    for _turn in range(chance.randint(1, 3)):
        bend(chance, document)
    try:
        return json.dumps(document).encode()
    except (ValueError, UnicodeEncodeError):
        return b"{}"


def bend(chance: random.Random, document: Any) -> None:
    at = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = chance.choice(keys)
        inner = at[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.15:
            break
        at = inner
    turn = chance.randrange(6)
    if turn == 0:
        del at[key]
    elif turn == 1 and isinstance(inner, int):
        at[key] = inner + chance.choice([-1, 1, 2**31, 2**63])
    elif turn == 2 and isinstance(at, dict):
        at[chance.choice([str(each) for each in STRANGE])] = deepcopy(inner)
    elif turn == 3 and isinstance(at, list):
        at.extend(deepcopy([inner] * chance.randint(1, 5)))
    else:
        at[key] = deepcopy(chance.choice(STRANGE))


def resigned(chance: random.Random, history: Any, files: Files, name: str) -> bytes:
    """Changed, and signed by keys that do not suffice, under their own ids or those of others."""
    from securesystemslib.formats import encode_canonical

    try:
        document = json.loads(bent(chance, history, files, name))
        payload = encode_canonical(document["signed"]).encode()
        ids = [each["keyid"] for each in document["signatures"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return b"{}"
    except Exception:
        return files[name][1:]
    names = INSUFFICIENT.get(name.rsplit(".", maxsplit=1)[-1], ["stranger"])
    signer = history.signers[chance.choice([*names, "stranger"])]
    signature = signer.sign(payload)
    ids = chance.choice([[signature.keyid], ids, [signature.keyid] * 3])
    document["signatures"] = [{"keyid": each, "sig": signature.signature} for each in ids]
    return json.dumps(document).encode()


INSUFFICIENT = {
    "root": ["root-1", "targets", "timestamp"],
    "targets": ["learner", "gate", "rollout", "snapshot", "timestamp"],
    "snapshot": ["timestamp", "rollout", "learner", "gate"],
    "timestamp": ["snapshot", "rollout", "learner", "gate"],
    "plans": ["learner", "gate", "snapshot", "timestamp"],
    "m-toy": ["learner", "gate", "rollout", "snapshot"],
}


def signatures_of_another(chance: random.Random, history: Any, files: Files, name: str) -> bytes:
    try:
        document, other = json.loads(files[name]), json.loads(a_genuine(chance, history, name))
        document["signatures"] = other["signatures"]
    except (ValueError, KeyError, TypeError):
        return files[name][:-1]
    return json.dumps(document).encode()


def deep(chance: random.Random, _: Any, files: Files, name: str) -> bytes:
    opening, closing = chance.choice([("[", "]"), ('{"signed":', "}"), ('{"a":[', "]}")])
    core = chance.choice(["", "1", files[name].decode("utf-8", "replace")])
    return (opening * DEEP + core + closing * chance.choice([0, DEEP])).encode()


def doubled_keys(chance: random.Random, _: Any, files: Files, name: str) -> bytes:
    """JSON in which a key of the top level, or of `signed`, stands twice."""
    extra = json.dumps(chance.choice([each for each in STRANGE if each != "\ud800"]))
    key = chance.choice(["signed", "signatures", "version", "targets", "meta", "_type"])
    text = files[name].decode("utf-8", "replace")
    at = chance.choice([1, max(1, text.find('"signed":{') + 10)])
    return f'{text[:at]}"{key}":{extra},{text[at:]}'.encode()


def random_bytes(chance: random.Random, _: Any, files: Files, name: str) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 50, len(files[name])]))


MUTATIONS: list[Mutate] = [
    *(flipped, cut, lengthened, spliced, exchanged, bent, bent, bent, resigned, resigned),
    *(signatures_of_another, deep, doubled_keys, random_bytes),
]


def attack(seed: int, history: Any) -> tuple[int, Files, list[str]]:
    """Which of the device's states is attacked, what the broker then holds, and what was done."""
    chance = random.Random(seed)
    kind = chance.choice([META, META, META, BLOB])
    which = 0 if kind == BLOB else chance.randrange(3)
    files, done = dict(chance.choice([history.states[-1]] * 3 + history.states)), list[str]()
    if chance.random() < 0.3:  # mixed: some files as they were at other times, or gone
        for name in chance.sample(sorted(files), chance.randint(1, 6)):
            old = chance.choice(history.states).get(name)
            done.append(f"{name} of another time")
            files[name] = old or b""
            if old is None or chance.random() < 0.2:
                del files[name]
    names = chance.choice([history.read] * 5 + [sorted(files)])
    names = [name for name in names if name.startswith(kind)]
    for name in chance.sample(names, min(len(names), chance.choice([1, 1, 1, 2, 3]))):
        mutate = chance.choice(MUTATIONS)
        if files.get(name):
            files[name] = mutate(chance, history, files, name)
            done.append(f"{name} {mutate.__name__}")
    return which, files, done


@COUNT
def test_no_forged_mixed_or_old_update_is_accepted_and_none_crashes(
    updates: SimpleNamespace, count: int
) -> None:
    history, device, refused = updates.history, updates.device, Counter[str]()
    genuine = history.outcomes
    around = sorted(path.name for path in device.folder.parent.iterdir())
    for seed in range(count):
        which, files, done = attack(seed, history)
        device.restore(updates.states[which])
        allowed = [genuine, genuine[-2:], genuine[-1:]][which]
        try:
            outcome = device.turn(files)
        except HeadwaterError as error:
            refused[error.code] += 1
        except BaseException as error:
            raise AssertionError(f"attack({seed}): {done}: crash") from error
        else:
            refused["harmless"] += 1
            assert outcome in allowed, f"attack({seed}): {done}: accepted"
        if seed % 20 == 0:  # whatever it was, the device is not lost
            assert device.turn(dict(history.states[-1])) == genuine[-1], f"attack({seed}): {done}"
    assert sorted(path.name for path in device.folder.parent.iterdir()) == around
    assert refused["harmless"] < count / 3, refused
    assert len(refused) > 6, refused
    print(dict(refused))
