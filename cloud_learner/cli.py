"""`cloud-learner`: the command of the cloud side.

Results go to stdout, narration to stderr; exit codes: 0 ok, 1 failure, 2 usage or configuration,
3 a gate refused, 4 unreachable.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from edge_runtime.errors import ConfigError, HeadwaterError, RequestError, TransportError

T = TypeVar("T")
_HOME = click.option(
    "--home", type=click.Path(path_type=Path), default=Path("var/cloud"), help="The learner's home."
)


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


@main.command()
@_HOME
@click.option("--nats", default="", help="Broker url; without one, a broker is started as a child.")
def serve(home: Path, nats: str) -> None:
    """Ingest, learn, gate, publish and roll out, until stopped.

    Example: cloud-learner serve --home var/cloud
    """
    from cloud_learner.config import Home
    from cloud_learner.serve import serve_home

    _guarded(lambda: serve_home(Home(home), nats))


@main.command()
@click.option("--nats", default="", help="Broker url, as `serve` prints it.")
@click.option("--home", type=click.Path(path_type=Path), help="The learner's home.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(nats: str, home: Path | None, *, as_json: bool) -> None:
    """What the learner says about itself, or what became of every record of every device.

    With --nats, the learner's own word; with --home, the accounts in its database, whether or not
    it runs: archived + quarantined + dropped is the mark, for each device, epoch and class.

    Example: cloud-learner status --home var/cloud
    """
    if not nats and home is None:
        raise click.UsageError("give --nats, --home or both")
    said = _guarded(lambda: asyncio.run(_status(nats))) if nats else {}
    accounts = _guarded(lambda: _accounts(home)) if home else {}
    if as_json:
        click.echo(json.dumps({**said, **accounts}))
        return
    for name, value in said.items():
        click.echo(f"{name:>24}  {value}")
    if accounts:
        from cloud_learner.console.accounts import table

        click.echo(table(accounts))


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


def _accounts(home: Path) -> dict[str, Any]:
    from cloud_learner.config import Home
    from cloud_learner.console.accounts import facts
    from cloud_learner.store.ingest_db import read_accounts

    path = Home(home).ingest_db
    if not path.exists():
        Home(home).origin()  # names what is wrong with a home that is none
        return facts({})
    return facts(read_accounts(path))


async def _status(url: str) -> dict[str, Any]:
    from edge_runtime.bus import nats as bus_nats
    from edge_runtime.wire import codec, subjects

    bus = await bus_nats.connect(url, name="status")
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
    return {"clock_s": clock_s, "stage": found.stage, **found.counters, "detail": detail}


def _guarded(call: Callable[[], T]) -> T:
    """The result of `call`; an error becomes its text and its exit code."""
    try:
        return call()
    except (HeadwaterError, OSError) as error:
        _fail([error])
    except ExceptionGroup as group:  # what a task raised comes out of its group
        errors, defects = group.split((HeadwaterError, OSError))
        if errors is None or defects is not None:
            raise
        _fail(list(_leaves(errors)))


def _fail(errors: list[Exception]) -> NoReturn:
    for error in errors:
        click.echo(f"error: {error}", err=True)
    sys.exit(_exit_code(errors[0]))


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _exit_code(error: Exception) -> int:
    if isinstance(error, HeadwaterError) and error.code == "gate_refused":
        return 3
    if isinstance(error, ConfigError | RequestError):
        return 2
    return 4 if isinstance(error, TransportError) else 1


def _tell(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
