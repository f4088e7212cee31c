"""The audit of a family's rollouts: does each decision follow from what its trial was told?

Why: who asks months later why a release reached the fleet, or did not, must not have to believe
anybody. The decisions are the signed plans; what they rest on lies in the journals of the trials.

Invariants: a decision agrees if its plan is signed by the rollout's key, if the campaign's own
code, told what the journal holds, comes to that very plan, and if lineage says the same. A report
in it must be signed by its device, where the key is known. The plan's note has the digest of the
journal: what is changed in it afterwards does not agree. Nothing is written.

Knows nothing about a campaign that runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from cloud_learner.admission import Admissions
from cloud_learner.config import Home
from cloud_learner.release.custody import Trust
from cloud_learner.rollout.journal import JOURNAL_BYTES_MAX, fed_of
from cloud_learner.rollout.replay import replayed
from cloud_learner.store.lineage import Lineage
from edge_runtime.bus.nkey import is_signed
from edge_runtime.errors import ConfigError, HeadwaterError, RequestError, TrustError
from edge_runtime.rollout.plan import Plan, decode_plan, encode_plan, plan_path
from edge_runtime.update.trust import PLANS_ROLE
from edge_runtime.wire import codec, subjects


class Finding(msgspec.Struct, frozen=True):
    """A decision of a trial, and why it does not agree; nothing where it does."""

    release: str
    plan_seq: int
    reason: str
    note: str
    against: str = ""

    @property
    def agrees(self) -> bool:
        """Whether signed plan, journal and lineage say the same."""
        return not self.against


class _Published(msgspec.Struct, frozen=True):
    plan: str
    signed: str


def audit(home: Home, family: str, release: str = "") -> list[Finding]:
    """Every decision whose journal is kept, or those about one release, oldest first.

    Raises: ConfigError (unknown_family, unknown_release, no_trust, lineage_damaged).
    """
    if family not in home.families():
        known = ", ".join(home.families())
        raise ConfigError("unknown_family", f"{home.root} has no {family!r}", f"known: {known}")
    folder, trust = home.of(family).trials, Trust.read(home.root / "tuf")
    keys = Admissions(home).devices
    told = {
        entry["plan_seq"]: entry["note"]
        for kind in ("decision", "plan")
        for entry in Lineage(home.lineage).of(family).read(kind)
        if "plan_seq" in entry
    }
    paths = sorted(folder.glob(f"*-{release or '*'}.jsonl"))
    if release and not paths:
        kept = ", ".join(path.stem.partition("-")[2] for path in sorted(folder.glob("*.jsonl")))
        hint = f"kept are those of: {kept}"
        raise ConfigError("unknown_release", f"no journal of {release!r} is kept", hint)
    return [finding for path in paths for finding in _trial(path, trust, keys, told)]


def _trial(
    path: Path, trust: Trust, keys: Mapping[str, str], told: Mapping[int, str]
) -> Iterator[Finding]:
    """The decisions of one trial; of a plan that is not published yet, nothing is said."""
    release = path.stem.partition("-")[2]
    again, broken = _again(path, keys)
    for published in _published(path.with_suffix(".plans")):
        try:
            plan = decode_plan(published.plan.encode())
        except TrustError as error:
            yield Finding(release, 0, "", "", f"a published plan cannot be read: {error}")
            continue
        against = _unsigned(published, plan, trust)
        if not against and again.get(plan.seq) != plan:
            against = broken or _other(again.get(plan.seq), path)
        if not against and told.get(plan.seq) != plan.note:
            against = "lineage says something else, or nothing"
        yield Finding(release, plan.seq, plan.reason, plan.note, against)


def _again(path: Path, keys: Mapping[str, str]) -> tuple[dict[int, Plan], str]:
    """The plans that the journal comes to, and what ended it before its end."""
    lines, found = path.read_bytes().split(b"\n")[:-1], {}
    try:
        for plan in replayed(_checked(lines, keys)):
            found[plan.seq] = plan
    except RequestError as error:
        return found, f"the journal does not hold together: {error.message}"
    return found, ""


def _checked(lines: Iterable[bytes], keys: Mapping[str, str]) -> Iterator[bytes]:
    """The lines, up to a report that its device has not signed, of those whose keys are known."""
    for number, line in enumerate(lines, start=1):
        fed = fed_of(line) if number > 1 else None
        if fed is not None and fed.signed is not None and (report := fed.told()) is not None:
            data = codec.signed_report(subjects.report(report.device), fed.signed.body)
            key = keys.get(report.device)
            if key is not None and not is_signed(data, fed.signed.signature, key):
                who = f"the report in line {number} is not signed by {report.device}'s key of now"
                raise RequestError("bad_journal", who)
        yield line


def _published(path: Path) -> Iterator[_Published]:
    """What was published of a trial, each plan once."""
    seen: set[str] = set()
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            found = msgspec.json.decode(line, type=_Published)
        except msgspec.DecodeError as error:
            yield _Published(f"{error}", "")
            continue
        if found.plan not in seen:
            seen.add(found.plan)
            yield found


def _unsigned(published: _Published, plan: Plan, trust: Trust) -> str:
    """Why a plan does not count as signed."""
    try:
        listed = trust.listed(PLANS_ROLE, published.signed.encode())
    except HeadwaterError as error:
        return f"the plan is not signed by a key that counts now: {error.message}"
    digest = hashlib.sha256(encode_plan(plan)).hexdigest()
    if listed.get(plan_path(plan.family)) != digest:
        return "what is signed is another plan"
    return ""


def _other(plan: Plan | None, path: Path) -> str:
    if path.stat().st_size > JOURNAL_BYTES_MAX - (1 << 20):
        return "its journal was too long to be kept whole"
    if plan is None:
        return "the journal comes to no such decision"
    return f"the journal comes to: {plan.reason}, {plan.note}"
