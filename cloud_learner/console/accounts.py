"""The accounts of a fleet, for people and for programs: what became of every record, by lane.

Why: whoever operates a fleet must be able to check that nothing is missing, and see where it is.

Invariants: what is shown is what one transaction of the ingest database holds. For each lane
(device, epoch, class), archived + quarantined + dropped is its mark; `under_way` is what the device
says it has above that, as of its last report.

Knows nothing about how records are accounted for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cloud_learner.store.ingest_state import Account, Lane

_COLUMNS = ("device", "epoch", "class", "mark", "archived", "quarantined", "dropped", "under way")


def facts(accounts: Mapping[Lane, Account]) -> dict[str, Any]:
    """All of it as plain values: `lanes`, `totals` and whether they are `balanced`."""
    lanes = [_lane(lane, account) for lane, account in sorted(accounts.items())]
    totals: Counter[str] = Counter(mark=0, archived=0, quarantined=0, dropped=0, under_way=0)
    for lane in lanes:
        totals.update({name: lane[name] for name in totals if name != "dropped"})
        totals["dropped"] += sum(lane["dropped"].values())
    balanced = all(account.is_balanced for account in accounts.values())
    return {"balanced": balanced, "totals": dict(totals), "lanes": lanes}


def table(found: Mapping[str, Any]) -> str:
    """What `facts` found as lines for a terminal."""
    rows = [_COLUMNS, *map(_row, found["lanes"]), _row({**found["totals"], "device": "all"})]
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths) for row in cells]
    said = "balanced" if found["balanced"] else "NOT BALANCED: archived + quarantined + dropped"
    return "\n".join([*lines, said])


def _lane(lane: Lane, account: Account) -> dict[str, Any]:
    device, epoch, event_class = lane
    return {
        "device": device,
        "epoch": epoch,
        "class": event_class,
        "mark": account.seq,
        "archived": account.archived,
        "quarantined": account.quarantined,
        "dropped": dict(sorted(account.dropped.items())),
        "durable": account.durable,
        "under_way": max(0, account.durable - account.seq),
        "prior": account.prior,
    }


def _row(lane: Mapping[str, Any]) -> Sequence[Any]:
    dropped = lane["dropped"]
    if isinstance(dropped, dict):
        reasons = ", ".join(f"{name} {number:,}" for name, number in dropped.items())
        dropped = reasons or "0"
    numbers = [_number(dropped if name == "dropped" else lane[name]) for name in _NUMBERS]
    return (lane["device"], lane.get("epoch", ""), lane.get("class", ""), *numbers)


_NUMBERS = ("mark", "archived", "quarantined", "dropped", "under_way")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    pairs = list(zip(cells, widths, strict=True))
    left = [cell.ljust(width) for cell, width in pairs[:3]]
    return "  ".join([*left, *(cell.rjust(width) for cell, width in pairs[3:])]).rstrip()
