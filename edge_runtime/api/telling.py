"""The status of a device in lines for people, as `edge-runtime status` prints them.

Why: the status holds every number there is; who looks at a device wants the few that say how it is.

Knows nothing about sockets, and where the numbers come from.
"""

from __future__ import annotations

from typing import Any


def told(answer: dict[str, Any]) -> str:
    """The status, a line for each thing that a person would ask for."""
    lines = [f"device    {answer['device']}, epoch {answer['epoch']}"]
    for name, family in answer["families"].items():
        arms = ", ".join(_arm(each) for each in family["arms"])
        lines.append(f"family    {name}: {arms or 'no release yet'}, plan {family['plan_seq']}")
        verdicts = answer.get("verdicts", {}).get(name, {})
        lines += [_evidence(each, verdicts.get(each["release"], {})) for each in family["arms"]]
    for name, wait in answer.get("waits", {}).items():
        lines.append(f"waits     {name}: {wait['for']} {wait['until']}".rstrip())
    counted = ", ".join(f"{n} {name}" for name, n in answer["counters"].items())
    lines.append(f"counted   {counted}")
    for asked in ("predict", "infer"):
        took = answer[f"{asked}_us"]
        lines.append(f"{asked:<9} p50 {took['p50']:.0f} µs, p99 {took['p99']:.0f} µs")
    if "sessions" in answer:
        lines.append(f"sessions  {_sessions(answer['sessions'])}")
    if "bus" in answer:
        there = "connected" if answer["bus"]["connected"] else "not connected"
        lines.append(f"broker    {there}, {answer['uplink']['unlearned']} numbers not learned")
    if "health" in answer:  # of a daemon
        lines.append(f"health    {', '.join(answer['health']['reasons']) or 'ok'}")
    kept = answer["log"]
    lines.append(f"log       {kept['bytes']} bytes, {kept['pending']} records not yet durable")
    wear = kept["written_bytes"] / kept["payload_bytes"] if kept["payload_bytes"] else 0.0
    flash = f"{kept['flash_bytes_today']} bytes written today, {kept['flash_bytes_yesterday']}"
    lines.append(f"flash     {flash} yesterday, {wear:.2f} per byte logged")
    return "\n".join(lines)


def _sessions(counts: dict[str, int]) -> str:
    """What is open now, and what else was counted."""
    others = [
        f"{n} {name}"
        for name, n in counts.items()
        if n and name != "open" and not name.endswith("bytes")
    ]
    return ", ".join([f"{counts['open']} open in {counts['bytes']} bytes", *others])


def _evidence(arm: dict[str, Any], verdict: dict[str, Any]) -> str:
    """Why this release is here: its counter, its gate's verdict, and what it came from."""
    said = "verdict not read yet" if arm["counter"] else "of no signed plan"
    if verdict:
        said = f"{len(verdict['rules'])} rules {verdict['outcome']}"
    came = arm["provenance"]
    parent = f", after {came['parent']}" if came.get("parent") else ""
    return f"release   {arm['release']}: counter {arm['counter']}, {said}{parent}"


def _arm(arm: dict[str, Any]) -> str:
    variant = f" {arm['variant']}" if arm["variant"] else ""
    short = f"{min(times):.0f} to " if (times := arm.get("bucket_us", {}).values()) else ""
    return f"{arm['arm']} {arm['release']}{variant} ({short}{arm['run_us']:.0f} µs a run)"
