"""Commands of `cloud-learner` that stand apart: looking back at what a home has kept, the demo of
sessions, and the gate as a process of its own; `cli` has all of them.

Results go to stdout, narration to stderr.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from cloud_learner.exits import guarded, tell


@click.command()
@click.argument("family", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--home", type=click.Path(path_type=Path), default=Path("var/cloud"))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def backfill(family: Path, home: Path, *, as_json: bool) -> None:
    """Give the features that are new in FAMILY (a folder) their history, and release them.

    Raw envelopes that the home kept go through the device's engine once more, under the new
    features.toml; from the examples that come of it, the first release of the new features is
    learned, gated, signed and offered. Stop `serve` first.

    Example: cloud-learner backfill models/flight_delay --home var/cloud
    """
    from cloud_learner.config import Home
    from cloud_learner.console.backfilled import table
    from cloud_learner.experiment.backfill import backfill as run
    from cloud_learner.experiment.backfill import facts

    found = guarded(lambda: facts(run(family, Home(home), tell)))
    click.echo(json.dumps(found) if as_json else table(found))


@click.command()
@click.option(
    "--var",
    type=click.Path(path_type=Path),
    default=Path("var/demo-session"),
    help="Where the model lies that the first start learns.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8620, show_default=True, help="0: any."
)
def demo_session(var: Path, port: int) -> None:
    """Serve a page on this machine that shows a session adapt while you click. Ctrl-C ends it.

    Example: cloud-learner demo-session --port 8620
    """
    from cloud_learner.simulate.session_demo import run

    guarded(lambda: run(var, port, tell=tell, say=click.echo))


@click.group(invoke_without_command=True)
@click.option("--home", type=click.Path(path_type=Path), default=Path("var/gate"))
@click.option("--nats", default="", help="Broker url, as `serve` prints it.")
@click.option("--key", type=click.Path(path_type=Path), help="By default the home's gate.nk.")
@click.option("--tls-ca", type=click.Path(path_type=Path), help="Who vouches for the broker.")
@click.pass_context
def gate(
    context: click.Context, home: Path, nats: str, key: Path | None, tls_ca: Path | None
) -> None:
    """Judge candidates and sign what passed, in a process and under a key of its own.

    The home is the gate's own; `cloud-learner gate init` makes it. The learner asks over the bus.

    Example: cloud-learner gate --home var/gate --nats nats://127.0.0.1:4222
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import replace

    from cloud_learner.admission import gate_access
    from cloud_learner.config import Home
    from cloud_learner.serve import serve_gate
    from edge_runtime.errors import ConfigError

    def run() -> None:
        if not nats:
            raise ConfigError("no_broker", "a gate has no broker of its own", "--nats URL")
        access = gate_access(Home(home))
        serve_gate(Home(home), nats, replace(access, key=key or access.key, tls_ca=tls_ca))

    guarded(run)


@gate.command("init")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--home", type=click.Path(path_type=Path), default=Path("var/gate"))
def gate_init(source: Path, home: Path) -> None:
    """Move the gate out of SOURCE, a learner's home, into a home of its own. Stop `serve` first.

    Afterwards SOURCE holds no gate's key: its `serve` asks the gate over the broker. Give the new
    folder to the user or the machine that the gate shall run as.

    Example: cloud-learner gate init var/cloud --home var/gate
    """
    from cloud_learner.config import Home
    from cloud_learner.gate_home import move_out

    guarded(lambda: move_out(Home(source), Home(home)))
    tell(f"{home} is the gate's home and the only place of its key")
    tell(f"start it beside `serve`: cloud-learner gate --home {home} --nats URL")
