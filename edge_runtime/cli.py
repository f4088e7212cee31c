"""`edge-runtime`: set a device up, run it, ask it.

Why: results go to stdout, narration to stderr, so that each command can stand in a script.

Exit codes: 0 ok, 1 failure, 2 usage or configuration, 4 the runtime or the broker does not answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import click
import msgspec

from edge_runtime import config as configuration
from edge_runtime import logs
from edge_runtime.errors import ConfigError, HeadwaterError, RequestError, TransportError

if TYPE_CHECKING:
    from edge_runtime.api.client import Client

ANSWER_S = 60.0
"""How long a command waits for an answer; a roll back loads a model first."""

P = ParamSpec("P")

_config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("edge.toml"),
    show_default=True,
    help="The device's configuration.",
)
_socket_option = click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    help="The runtime's socket; by default the configuration says where it is.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def exit_code_of(error: HeadwaterError) -> int:
    """The exit code that an error ends a command with."""
    if isinstance(error, ConfigError):
        return 2
    return 4 if isinstance(error, TransportError) else 1


def _reported(command: Callable[P, None]) -> Callable[P, None]:
    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except HeadwaterError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(exit_code_of(error))
        except OSError as error:  # of a file that nobody foresaw
            click.echo(f"error: {error}", err=True)
            sys.exit(1)

    return run


@click.group()
@click.version_option(package_name="headwater")
def main() -> None:
    """Answer predictions at the edge, remember every event, follow signed updates."""


@main.command()
@_config_option
@click.option("--device", help="Name of this device; needed for a new configuration.")
@click.option("--family", "families", multiple=True, help="A model family to serve; repeatable.")
@click.option("--attribute", "attributes", multiple=True, metavar="KEY=VALUE")
@click.option("--nats", help="URL of the broker, such as nats://127.0.0.1:4222.")
@click.option("--root", help="The publisher's trusted root.json; needed with --nats.")
@click.option(
    "--package",
    "packages",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Put this ONNX package on the shelf, to be served from the next start; repeat for variants"
    " of the same release, of which the device takes the fastest that is right.",
)
@_reported
def init(config_path: Path, packages: tuple[Path, ...], **options: Any) -> None:
    """Write a configuration, make the device's key, put a factory package on the shelf.

    With a broker, its public key is the result on stdout; the secret stays in the state directory.

    Example: edge-runtime init --device kiosk-1 --package flight_delay.onnx
    """
    from edge_runtime import factory

    info = factory.inspect(*packages) if packages else None
    if config_path.exists():
        if any(options.values()):
            raise ConfigError(
                "config_exists",
                f"{config_path} exists and was not changed",
                "edit it, or leave out all options but --config and --package",
            )
        config = configuration.load(config_path)
    else:
        config = factory.write_config(config_path, info, **options)
        click.echo(f"wrote {config_path}", err=True)
    if info is not None:
        release = factory.install(config, packages[0], info, packages[1:])
        click.echo(f"{info.family} will serve {release}", err=True)
    if config.nats and config.broker.credentials is None:
        key = factory.own_key(config)
        click.echo(f"at the learner: cloud-learner admit {config.device} {key}", err=True)
        click.echo(key)
    click.echo(f"next: edge-runtime run --config {config_path}", err=True)


@main.command()
@_config_option
@click.option(
    "--package",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Serve this ONNX file alone: no configuration, no broker, no keys, no learner.",
)
@click.option("--http", "http_port", type=click.IntRange(1, 65535), help="Its port on 127.0.0.1.")
@click.option("--socket", type=click.Path(path_type=Path), help="Its socket.  [default: edge.sock]")
@_reported
def run(
    config_path: Path, package: Path | None, http_port: int | None, socket: Path | None
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Example: edge-runtime run --config edge.toml
    Example: edge-runtime run --package model.onnx --http 8080
    """
    if package is None:
        if http_port is not None or socket is not None:
            raise click.UsageError("--http and --socket need --package; see edge.toml instead")
        from edge_runtime import daemon

        config = configuration.load(config_path)
        logs.setup(config.logging.format, config.logging.level)
        daemon.run(config)
    else:
        from edge_runtime import local

        logs.setup()
        narrate = partial(click.echo, err=True)
        local.run(package, socket or Path("edge.sock"), http_port, narrate)


@main.command()
@_config_option
@_socket_option
@_json_option
@_reported
def status(config_path: Path, socket_path: Path | None, as_json: bool) -> None:
    """Say how the running runtime is.

    Example: edge-runtime status --json
    """
    from edge_runtime.api.telling import told

    with _client(config_path, socket_path) as client:
        answer = client.status().status
    click.echo(msgspec.json.encode(answer).decode() if as_json else told(answer))


@main.command()
@_config_option
@_socket_option
@_json_option
@click.argument("family")
@click.argument("event")
@_reported
def predict(
    config_path: Path, socket_path: Path | None, as_json: bool, family: str, event: str
) -> None:
    """Ask the running runtime to answer EVENT, a JSON object; "-" reads it from stdin.

    Example: edge-runtime predict flight_delay
    '{"kind": "scheduled", "time_s": 1.36e9, "fields": {"carrier": "AA"}}'
    """
    asked = _event(sys.stdin.read() if event == "-" else event)
    with _client(config_path, socket_path) as client:
        answer = client.predict(family, asked.kind, asked.time_s, asked.fields)
    result = {name: getattr(answer, name) for name in ("id", "outputs", "release", "arm")}
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        values = " ".join(f"{value:.6g}" for value in answer.outputs)
        click.echo(f"{values}\t{answer.id}\t{answer.release} ({answer.arm})")


@main.command()
@_config_option
@_socket_option
@click.argument("family")
@click.option("--reason", required=True, help="Why; the daemon writes it into its log.")
@_reported
def rollback(config_path: Path, socket_path: Path | None, family: str, reason: str) -> None:
    """Let FAMILY answer with the release before this one, now and until a newer plan comes.

    Example: edge-runtime rollback flight_delay --reason "answers are always 0"
    """
    with _client(config_path, socket_path) as client:
        release = client.rollback(family, reason).release
    click.echo(release)


@main.command()
@_config_option
@_socket_option
@click.argument("family", required=False, default="")
@_reported
def forget_sessions(config_path: Path, socket_path: Path | None, family: str) -> None:
    """Forget all personal sessions at once, of FAMILY or of every family; says how many.

    Example: edge-runtime forget-sessions
    """
    with _client(config_path, socket_path) as client:
        forgotten = client.forget_sessions(family).sessions
    click.echo(forgotten)


@main.command()
@_config_option
@_json_option
def doctor(config_path: Path, as_json: bool) -> None:
    """Look at what the device stands on; exit code 1 when something will not work.

    Example: edge-runtime doctor
    """
    from edge_runtime import doctor as looking

    findings = looking.examine(config_path)
    failed = any(each.state == "fail" for each in findings)
    if as_json:
        click.echo(msgspec.json.encode({"ok": not failed, "findings": findings}).decode())
    else:
        click.echo(looking.told(findings))
    sys.exit(int(failed))


def _client(config_path: Path, socket_path: Path | None) -> Client:
    from edge_runtime.api.client import Client

    path = socket_path or configuration.load(config_path).socket
    return Client(path, timeout_s=ANSWER_S)


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    time_s: float
    fields: dict[str, Any]


def _event(text: str) -> _Asked:
    try:
        return msgspec.json.decode(text, type=_Asked)
    except (msgspec.DecodeError, ValueError) as error:
        raise RequestError(
            "bad_event",
            f"EVENT is not valid: {error}",
            """write it as '{"kind": "...", "time_s": 0, "fields": {}}'""",
        ) from error


if __name__ == "__main__":
    main()
