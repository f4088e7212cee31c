"""`cloud-learner`: the command of the cloud side.

Results go to stdout, narration to stderr; exit codes: 0 ok, 1 failure, 2 usage or configuration,
3 a gate refused, 4 unreachable.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloud_learner.access import HOME as _HOME
from cloud_learner.access import access as _access
from cloud_learner.access import by_key as _by_key
from cloud_learner.commands import backfill, demo_session, gate
from cloud_learner.exits import guarded as _guarded
from cloud_learner.exits import tell as _tell
from cloud_learner.rollouts import rollout
from edge_runtime.errors import TransportError

if TYPE_CHECKING:
    from edge_runtime.bus.access import Access


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Learn from a fleet, gate, sign and roll out.

    Example: cloud-learner demo
    """


@main.command()
@click.argument("family", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_HOME
def bootstrap(family: Path, data: Path, home: Path) -> None:
    """Make the first signed release of FAMILY (a folder) from DATA (Parquet or CSV).

    Example: cloud-learner bootstrap models/flight_delay january.parquet --home var/cloud
    """
    from cloud_learner.bootstrap import bootstrap as run
    from cloud_learner.config import Home
    from cloud_learner.gate import as_facts

    judgement = _guarded(lambda: run(family, data, Home(home), _tell))
    click.echo(json.dumps(as_facts(judgement), indent=2))


main.add_command(backfill)
main.add_command(demo_session)
main.add_command(gate)
main.add_command(rollout)


@main.command()
@_HOME
@click.option("--nats", default="", help="Broker url; without one, a broker is started as a child.")
@_by_key
def serve(home: Path, nats: str, **files: Path | None) -> None:
    """Ingest, learn, gate, publish and roll out, until stopped.

    Example: cloud-learner serve --home var/cloud
    """
    from cloud_learner.config import Home
    from cloud_learner.serve import serve_home

    _guarded(lambda: serve_home(Home(home), nats, access=_access(home, files)))


@main.command()
@_HOME
@click.option("--nats", default="", help="Broker url, as `serve` prints it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_by_key
def status(home: Path, nats: str, *, as_json: bool, **files: Path | None) -> None:
    """What became of every record of every device, and what the learner says of each family.

    The accounts are read from the home, whether or not the learner runs: archived + quarantined +
    dropped is the mark, for each device, epoch and class. With --nats, the learner's own word too.

    Example: cloud-learner status --home var/cloud
    """
    accounts = _guarded(lambda: _accounts(home, is_needed=not nats))
    said = _guarded(lambda: asyncio.run(_status(nats, _access(home, files)))) if nats else {}
    if as_json:
        click.echo(json.dumps({**said, **accounts}))
        return
    if said:
        from cloud_learner.console.families import text

        click.echo(text(said))
    if accounts:
        from cloud_learner.console.accounts import table

        click.echo(table(accounts))


@main.command()
@click.argument("family", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--cadence", default="never,30d,7d,1d,1h", show_default=True, help="How often.")
@click.option(
    "--policy",
    default="incremental",
    show_default=True,
    help="Also fast, stable, and scratch:SPAN such as scratch:30d; several with commas.",
)
@click.option("--offsets", default=5, type=click.IntRange(1), help="Phases of each cadence.")
@click.option("--seeds", default=3, type=click.IntRange(1), help="Trajectories of each policy.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("var/freshness"))
def freshness(
    family: Path, data: Path, *, cadence: str, policy: str, offsets: int, seeds: int, out: Path
) -> None:
    """What it is worth to ship new models of FAMILY more often, measured on DATA.

    Example: cloud-learner freshness models/flight_delay january.parquet --policy incremental
    """
    from cloud_learner.console.freshness_table import table
    from cloud_learner.experiment.freshness import freshness as run
    from cloud_learner.experiment.report import Options

    options = _guarded(lambda: Options.of(cadence, policy, offsets, seeds))
    report = _guarded(lambda: run(family, data, options, out, tell=_tell))
    click.echo(table(report))
    _tell(f"{out}: freshness.csv, freshness.json, freshness.svg")


@main.command()
@click.option("--full", is_flag=True, help="Play the whole year; the default is its first months.")
@click.option(
    "--var", type=click.Path(path_type=Path), default=Path("var/demo"), help="Where it all lies."
)
def demo(*, full: bool, var: Path) -> None:
    """Run the whole loop on real flights: three devices, a broker, the learner, and its attackers.

    Example: cloud-learner demo
    """
    from cloud_learner.simulate.demo import run

    sys.exit(_guarded(lambda: run(var, full=full)))


@main.command()
@click.argument("device")
@click.argument("public_key")
@click.option("--replace", is_flag=True, help="In place of the key that DEVICE has.")
@_HOME
def admit(device: str, public_key: str, home: Path, *, replace: bool) -> None:
    """Let DEVICE in to the broker by its PUBLIC_KEY, which `edge-runtime init` printed there.

    Example: cloud-learner admit kiosk-1 UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4
    """
    from cloud_learner.admission import Admissions
    from cloud_learner.config import Home

    known = _guarded(lambda: Admissions(Home(home)).admit(device, public_key, replace=replace))
    _tell(f"{device} is admitted, {_when(known)}")


@main.command()
@click.argument("device")
@_HOME
def expel(device: str, home: Path) -> None:
    """Let DEVICE in no more; where the broker runs, its connection is cut.

    Example: cloud-learner expel kiosk-1
    """
    from cloud_learner.admission import Admissions
    from cloud_learner.config import Home

    known = _guarded(lambda: Admissions(Home(home)).expel(device))
    _tell(f"{device} is expelled, {_when(known)}")


@main.command()
@_HOME
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def devices(home: Path, *, as_json: bool) -> None:
    """The devices that are admitted, and their public keys.

    Example: cloud-learner devices --home var/cloud
    """
    from cloud_learner.admission import Admissions
    from cloud_learner.config import Home

    found = _guarded(lambda: Admissions(Home(home)).devices)
    lines = json.dumps(found) if as_json else "\n".join(f"{k}  {v}" for k, v in found.items())
    click.echo(lines, nl=bool(lines))


@main.command("broker-config")
@_HOME
@click.option(
    "--check",
    "checked",
    type=click.Path(path_type=Path),
    help="Look at this server configuration instead; exit code 2 when it would not work.",
)
def broker_config(home: Path, checked: Path | None) -> None:
    """What a nats-server of your own must include so that it lets in whom the home admits.

    Example: cloud-learner broker-config > /etc/nats/headwater.conf
    """
    from cloud_learner.admission import Admissions
    from cloud_learner.config import Home
    from cloud_learner.server_check import check

    if checked is None:
        click.echo(_guarded(Admissions(Home(home)).rules), nl=False)
        return
    for weakness in _guarded(lambda: check(checked)):
        _tell(f"warning: {weakness}")


def _when(known: bool) -> str:
    if known:
        return "and the running broker knows it"
    return (
        "from serve's next start on; write broker-config anew, and reload twice, for another broker"
    )


def _accounts(home: Path, *, is_needed: bool) -> dict[str, Any]:
    from cloud_learner.config import Home
    from cloud_learner.console.accounts import facts
    from cloud_learner.store.ingest_db import read_accounts

    path = Home(home).ingest_db
    if path.exists():
        return facts(read_accounts(path))
    if is_needed:
        Home(home).origins()  # names what is wrong with a home that is none
        return facts({})
    return {}


async def _status(url: str, access: Access) -> dict[str, Any]:
    from edge_runtime.bus import nats as bus_nats
    from edge_runtime.wire import codec, subjects

    bus = await bus_nats.connect(url, name="status", access=access)
    try:
        message = await bus.last(subjects.STATE_STREAM, subjects.LEARNER_STATUS)
    except TransportError as error:
        if error.code != "no_stream":
            raise
        message = None
    finally:
        await bus.close()
    if message is None:
        raise TransportError("no_learner", f"no learner has spoken on {url}", "cloud-learner serve")
    found = codec.decode_status(message.data)
    detail = json.loads(found.detail) if found.detail else {}
    clock_s = found.clock_s if math.isfinite(found.clock_s) else None  # JSON knows no infinity
    head = {"clock_s": clock_s, "stage": found.stage, "families": detail.pop("families", {})}
    return {**head, **found.counters, "detail": detail}


if __name__ == "__main__":
    main()
