"""What time it is, asked of those who may say so: a question with a nonce, a signed answer.

Why: metadata that looks expired is either held back by somebody, or the device's clock is ahead; a
clock that was set back revives what has expired. Only somebody else can tell.

Invariants: an answer counts if it bears the nonce of this question and a signature by a key of the
role `time`, so it is no older than the question. Whatever else comes back is no time at all.

Knows nothing about what the time is needed for. Implements proto/asyncapi.yaml (channel hw.time).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from tuf.api.metadata import Key, Signature, Targets  # type: ignore[attr-defined] # no __all__

from edge_runtime.errors import RequestError, TrustError
from edge_runtime.update.trust import NONCE_BYTES, TIME_ROLE, time_payload
from edge_runtime.wire import codec
from edge_runtime.wire.messages import WIRE_VERSION, TimeAnswer, TimeQuestion

Keys = Mapping[str, Key]


def time_keys(targets: Targets) -> Keys:
    """The keys that may sign the time, by their ids; none where nobody may."""
    delegations = targets.delegations
    role = None if delegations is None else (delegations.roles or {}).get(TIME_ROLE)
    if delegations is None or role is None:
        return {}
    return {keyid: delegations.keys[keyid] for keyid in role.keyids if keyid in delegations.keys}


def signed_time_s(ask: Callable[[bytes], bytes], keys: Keys) -> float:
    """The time when the question was put, or a moment later, proven by one of `keys`.

    Raises: TrustError (bad_time), and what `ask` raises.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    data = ask(codec.encode(TimeQuestion(WIRE_VERSION, nonce)))
    try:
        answer = codec.decode_time_answer(data)
    except RequestError as error:
        raise TrustError("bad_time", error.message) from error
    _check(answer, nonce, keys)
    return answer.time_s


def _check(answer: TimeAnswer, nonce: bytes, keys: Keys) -> None:
    if answer.nonce != nonce:
        raise TrustError("bad_time", "a signed time that answers another question")
    key = keys.get(answer.keyid)
    if key is None:
        raise TrustError("bad_time", f"a time signed by {answer.keyid[:12]!r}, no key for that")
    try:
        payload = time_payload(nonce, answer.time_s)
        key.verify_signature(Signature(answer.keyid, answer.signature.hex()), payload)
    except (UnverifiedSignatureError, VerificationError, ValueError, OverflowError) as error:
        raise TrustError("bad_time", "a time whose signature is wrong") from error
