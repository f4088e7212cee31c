"""`cloud-learner rollout`: where releases stand, and a person's word to a campaign.

Results go to stdout, narration to stderr.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cloud_learner.access import HOME, access, by_key
from cloud_learner.exits import guarded, tell

if TYPE_CHECKING:
    from cloud_learner.orders import Order

_NATS = click.option("--nats", required=True, help="Broker url, as `serve` prints it.")
_REASON = click.option("--reason", required=True, help="Why; it is written down.")
_OPERATOR = click.option("--operator", default="", help="Who says it; by default you.")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


@click.group()
def rollout() -> None:
    """See where a release stands, hold it back, end it, or look at what decided.

    Example: cloud-learner rollout status --nats nats://127.0.0.1:4222
    """


@rollout.command("status")
@click.argument("family", default="")
@HOME
@_NATS
@_JSON
@by_key
def show(family: str, home: Path, nats: str, *, as_json: bool, **files: Path | None) -> None:
    """Stages, gates and devices of FAMILY, or of all.

    Example: cloud-learner rollout status flight_delay --nats nats://127.0.0.1:4222
    """
    from rich.console import Console

    from cloud_learner.console.rollout import tree

    found = _say(nats, home, files, verb="status", family=family)
    if as_json:
        click.echo(json.dumps(found))
        return
    for status in found.values():
        Console().print(tree(status, full=True))


@rollout.command("audit")
@click.argument("family")
@click.argument("release", default="")
@HOME
@_JSON
def look(family: str, release: str, home: Path, *, as_json: bool) -> None:
    """Come to each decision of FAMILY again, from signed plans and what its trials were told.

    Exit code 1 when one does not agree.

    Example: cloud-learner rollout audit flight_delay --home var/cloud
    """
    from cloud_learner.auditing import audit
    from cloud_learner.config import Home

    found = guarded(lambda: audit(Home(home), family, release))
    if as_json:
        rows = [{**msgspec.to_builtins(each), "agrees": each.agrees} for each in found]
        click.echo(json.dumps(rows))
    else:
        for each in found:
            click.echo(f"{'agrees' if each.agrees else 'DIFFERS':<8} {each.reason:<10} {each.note}")
            if each.against:
                click.echo(f"{'':<8} {each.against}")
    tell(f"{sum(each.agrees for each in found):,} of {len(found):,} decisions agree")
    sys.exit(any(not each.agrees for each in found))


@rollout.command("approve")
@click.argument("family")
@HOME
@_NATS
@_REASON
@_OPERATOR
@click.option("--key", "signing", type=click.Path(path_type=Path), help="The operator's own key.")
@partial(by_key, own="--nkey")
def approve(family: str, home: Path, nats: str, **options: Any) -> None:
    """Let a release of FAMILY that has passed its stage go on to the next.

    With --operator and --key, the gate signs, too, for devices that take no large step without it.

    Example: cloud-learner rollout approve flight_delay --reason "looks well" --nats URL
    """
    reason, operator, signing = (options.pop(name) for name in ("reason", "operator", "signing"))
    order = None
    if signing is not None:
        if not operator:
            raise click.UsageError("--key needs --operator, whose key it is")
        status = _say(nats, home, dict(options), verb="status", family=family)[family]
        order = guarded(lambda: consent_of(status, reason, operator, signing))
    word = {"by": operator or getpass.getuser(), "reason": reason, "order": order}
    _tell(_say(nats, home, options, verb="approve", family=family, **word))


def consent_of(status: dict[str, Any], reason: str, operator: str, key: Path) -> Order:
    """What an operator signs: that the release may be where the next stage brings it."""
    from cloud_learner import orders

    ahead = [each for each in status["stages"] if each["state"] == "ahead"]
    consent = orders.Consent(
        family=status["family"],
        packages=[status["canary"]["sha256"]] if status["canary"] else [],
        percent=ahead[0]["percent"] if ahead else 100.0,
        reason=reason,
    )
    return orders.signed(consent, operator, key)


def _tell(found: dict[str, Any]) -> None:
    for status in found.values():
        tell(f"{status['family']}: {status['stage']}, plan {status['plan_seq']}")


@rollout.command("compare")
@click.argument("family")
@click.argument("releases", nargs=2, metavar="RELEASE RELEASE")
@click.option("--answers", default=20_000, show_default=True, help="Those that end it.")
@HOME
@_NATS
@_REASON
@_OPERATOR
@by_key
def compare(family: str, releases: tuple[str, ...], answers: int, **options: Any) -> None:
    """Let two releases of FAMILY serve side by side, to know which is better and by how much.

    One of them is the release that serves now. The winner serves afterwards; where none is sure,
    nothing changes.

    Example: cloud-learner rollout compare ads r00010-ab r00012-cd --reason "a new head" --nats URL
    """
    _contest(family, {"kind": "ab", "releases": releases, "answers": answers}, **options)


@rollout.command("bandit")
@click.argument("family")
@click.argument("releases", nargs=-1, required=True, metavar="RELEASE...")
@click.option("--floor", default=0.05, show_default=True, help="The least share of each.")
@click.option("--every-s", default=900.0, show_default=True, help="How often shares change.")
@HOME
@_NATS
@_REASON
@_OPERATOR
@by_key
def bandit(
    family: str, releases: tuple[str, ...], floor: float, every_s: float, **options: Any
) -> None:
    """Let releases of FAMILY share the answers, most to whichever earns most at the time.

    One of them is the release that serves now. It goes on until it is aborted, or its time is over.

    Example: cloud-learner rollout bandit ads r00010-ab r00012-cd --reason "a fair" --nats URL
    """
    terms = {"kind": "bandit", "releases": releases, "floor": floor, "every_s": every_s}
    _contest(family, terms, **options)


@rollout.command("estimate")
@click.argument("family")
@click.argument("releases", nargs=-1, metavar="[RELEASE...]")
@click.option("--shares", default="", help="Shares that never were: r00010-ab=0.3,r00012-cd=0.7.")
@HOME
@_JSON
def estimate(
    family: str, releases: tuple[str, ...], shares: str, home: Path, *, as_json: bool
) -> None:
    """What each RELEASE of FAMILY would have earned alone, from answers that devices drew.

    Without releases: those that competed last. Read from the archive, with 95 % intervals.

    Example: cloud-learner rollout estimate flight_delay --home var/cloud
    """
    from cloud_learner.config import Home
    from cloud_learner.console.estimates import table
    from cloud_learner.estimating import estimates, shares_of

    found = guarded(lambda: estimates(Home(home), family, releases, shares_of(shares)))
    rows = msgspec.json.encode(found)  # what is no number is null
    click.echo(rows.decode() if as_json else table(msgspec.json.decode(rows)))


def _contest(
    family: str,
    asked: dict[str, Any],
    *,
    home: Path,
    nats: str,
    reason: str,
    operator: str,
    **files: Path | None,
) -> None:
    from cloud_learner.rollout.contest import Terms

    word = {"by": operator or getpass.getuser(), "reason": reason, "terms": Terms(**asked)}
    _tell(_say(nats, home, files, verb="contest", family=family, **word))


def _word(verb: str, text: str, *arguments: str) -> None:
    """Add the command `verb` to the group: FAMILY, its arguments, who and why."""

    def command(home: Path, nats: str, reason: str, operator: str, **rest: Any) -> None:
        files = {name: rest.pop(name) for name in list(rest) if name not in ("family", *arguments)}
        by = operator or getpass.getuser()
        _tell(_say(nats, home, files, verb=verb, by=by, reason=reason, **rest))

    command.__doc__ = text
    made: Callable[..., None] = by_key(command)
    made = HOME(_NATS(_REASON(_OPERATOR(made))))
    for name in reversed(("family", *arguments)):
        made = click.argument(name)(made)
    rollout.command(verb)(made)


_word(
    "pause",
    """Let FAMILY gather evidence and stop what does harm, and let nothing advance or begin.

    Example: cloud-learner rollout pause flight_delay --reason "a holiday" --nats URL
    """,
)
_word(
    "resume",
    """Let FAMILY go on.

    Example: cloud-learner rollout resume flight_delay --reason "all back" --nats URL
    """,
)
_word(
    "abort",
    """Roll back what is on trial in FAMILY, for good; or end its contest, with nothing changed.

    Example: cloud-learner rollout abort flight_delay --reason "wrong data" --nats URL
    """,
)
_word(
    "hold",
    """Let nothing change on DEVICE for FAMILY, until it is freed.

    Example: cloud-learner rollout hold flight_delay kiosk-1 --reason "at a fair" --nats URL
    """,
    "device",
)
_word(
    "pin",
    """Let DEVICE run RELEASE of FAMILY, as long as a plan names it or until it is freed.

    Example: cloud-learner rollout pin flight_delay kiosk-1 r00007-ab12 --reason "try" --nats URL
    """,
    "device",
    "release",
)
_word(
    "free",
    """Hold and pin DEVICE no longer.

    Example: cloud-learner rollout free flight_delay kiosk-1 --reason "the fair is over" --nats URL
    """,
    "device",
)


def _say(nats: str, home: Path, files: dict[str, Path | None], **word: Any) -> dict[str, Any]:
    from cloud_learner.steering import Word, say

    return guarded(lambda: asyncio.run(say(nats, access(home, files), Word(**word))))
