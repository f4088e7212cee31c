"""The device's configuration: one TOML file, read whole and checked before anything starts.

Why: a typo must stop the start with the file, the key and the nearest valid key, never become a
default that nobody chose.

Invariants: an `EdgeConfig` is valid; its paths are absolute, those in the file being relative to
the file's folder. Nothing here touches what the paths point at.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge_runtime.errors import ConfigError
from edge_runtime.tables import check_keys, converted
from edge_runtime.wire.subjects import checked_name

LOCAL_DEVICE = "local"
SOCKET_BYTES_MAX = 107  # sun_path of Linux, without its closing zero


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The event log: how long a group waits for its disk write, and how large the log may be."""

    linger_ms: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    linger_max_ms: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 50
    bytes_max_mb: Annotated[int, msgspec.Meta(ge=32)] = 1024


class HttpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where HTTP is served: on a loopback port (0: any free one), a Unix socket, both, neither."""

    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    socket: Path | None = None
    body_max_mb: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16

    @property
    def enabled(self) -> bool:
        """Whether HTTP is served at all."""
        return self.port is not None or self.socket is not None


class InferenceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Models too heavy for the event loop: their queue, their micro-batches, their deadline."""

    queue_max: Annotated[int, msgspec.Meta(ge=1)] = 256
    batch_rows_max: Annotated[int, msgspec.Meta(ge=1)] = 1
    batch_delay_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    deadline_ms: Annotated[int, msgspec.Meta(ge=1)] = 10_000


class LoggingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon says of itself on stderr."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class UplinkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a family leaves the device: a share of its events, all fields but those of `redact`,
    and at most so many bytes of events a day, UTC. The log on the device keeps everything.
    """

    sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    redact: list[Annotated[str, msgspec.Meta(min_length=1)]] = []
    bytes_per_day: Annotated[int, msgspec.Meta(ge=1)] | None = None


class BrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With what the device shows the broker who it is, and how it knows the broker."""

    key: Path | None = None
    credentials: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


class RolloutConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the device's owner lets plans do: with `hold`, nothing; and by how many percentage
    points the share of a fleet that runs a release may rise at once without the gate's approval.
    """

    hold: bool = False
    step_max: Annotated[float, msgspec.Meta(ge=0, le=100)] = 100.0


class SessionsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In-session personalization: a session ends when it was not used for `ttl_s`; all together
    take at most `bytes_max_mb`, and are at most `count_max`. With `keep` they survive a restart,
    with `export` the learner is told what many of them say together.
    """

    ttl_s: Annotated[float, msgspec.Meta(gt=0)] = 1800.0
    bytes_max_mb: Annotated[int, msgspec.Meta(ge=1)] = 32
    count_max: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    keep: bool = False
    export: bool = False


class EdgeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `edge.toml` says. See the defaults here for what may be left out.

    `nats` is the broker's URL; empty: the device answers from its shelf and sends nothing.
    `root` is the trusted root of signed metadata, needed as soon as there is a broker. The agent
    asks for updates when nudged, and every `poll_s` seconds. `socket_mode` and `socket_group` are
    those of both Unix sockets. `uplink` holds rules by family; a family without sends everything.

    `package` is no key of the file: with it, the device serves that one ONNX file and no shelf.
    """

    device: str
    families: Annotated[list[str], msgspec.Meta(min_length=1)]
    state_dir: Path
    socket: Path
    nats: str = ""
    root: Path | None = None
    attributes: dict[str, str] = {}
    socket_mode: Annotated[str, msgspec.Meta(pattern="^0[0-7]{3}$")] = "0600"
    socket_group: str = ""
    broker: BrokerConfig = BrokerConfig()
    log: LogConfig = LogConfig()
    http: HttpConfig = HttpConfig()
    inference: InferenceConfig = InferenceConfig()
    logging: LoggingConfig = LoggingConfig()
    uplink: dict[str, UplinkConfig] = {}
    rollout: RolloutConfig = RolloutConfig()
    sessions: SessionsConfig = SessionsConfig()
    poll_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    package: Path | None = None

    def serves(self, family: str) -> bool:
        """Whether this device is configured to serve `family`."""
        return family in self.families

    @property
    def own_key(self) -> Path:
        """Where `init` keeps the seed of the device's key."""
        return self.state_dir / "device.nk"

    @property
    def socket_bits(self) -> int:
        """`socket_mode` as a number."""
        return int(self.socket_mode, 8)


def load(path: Path) -> EdgeConfig:
    """The configuration in the file at `path`. Raises: ConfigError naming file and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            "no_config", f"{path}: no such file", f"edge-runtime init --config {path}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("unreadable_config", f"{path}: {error}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> EdgeConfig:
    """The configuration in `text`, as if it stood in the file at `path`. Raises: ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("bad_toml", f"{path}: {error}") from error
    check_keys(table, EdgeConfig, path, "")
    _check_uplink(table, path)
    config = converted(table, EdgeConfig, path, "")
    return _checked(_resolved(config, path.absolute().parent), path)


def local_config(
    package: Path,
    family: str,
    state_dir: Path,
    *,
    socket: Path | None = None,
    http: HttpConfig | None = None,
) -> EdgeConfig:
    """Serve the one ONNX file `package` as `family`: no broker, no keys, no learner.

    Raises: ConfigError for a family's name or a socket's path that cannot work.
    """
    config = EdgeConfig(
        device=LOCAL_DEVICE,
        families=[family],
        state_dir=state_dir,
        socket=socket or state_dir / "edge.sock",
        http=http or HttpConfig(),
        log=LogConfig(bytes_max_mb=64),
        package=package,
    )
    return _checked(_resolved(config, Path.cwd()), package)


def _check_uplink(table: dict[str, Any], path: Path) -> None:
    """Name the family of a wrong rule, which msgspec does not."""
    rules, families = table.get("uplink"), table.get("families")
    if not isinstance(rules, dict) or not isinstance(families, list):
        return  # said by who reads the whole
    for family, rule in rules.items():
        if family not in families:
            raise ConfigError(
                "unknown_family",
                f"{path}: uplink.{family}: this device serves no family of that name",
                f"write [uplink.<family>], where family is one of: {', '.join(map(str, families))}",
            )
        if isinstance(rule, dict):
            check_keys(rule, UplinkConfig, path, f"uplink.{family}.")
        converted(rule, UplinkConfig, path, f"uplink.{family}")


def _resolved(config: EdgeConfig, folder: Path) -> EdgeConfig:
    return msgspec.structs.replace(
        config,
        state_dir=folder / config.state_dir,
        socket=folder / config.socket,
        root=None if config.root is None else folder / config.root,
        package=None if config.package is None else folder / config.package,
        broker=_resolved_broker(config.broker, folder),
        http=msgspec.structs.replace(
            config.http, socket=None if config.http.socket is None else folder / config.http.socket
        ),
    )


def _resolved_broker(broker: BrokerConfig, folder: Path) -> BrokerConfig:
    named = {name: path for name, path in msgspec.structs.asdict(broker).items() if path}
    return BrokerConfig(**{name: folder / path for name, path in named.items()})


def _checked(config: EdgeConfig, path: Path) -> EdgeConfig:
    try:
        checked_name(config.device, "device")
        for family in config.families:
            checked_name(family, "families:")
    except ConfigError as error:
        raise ConfigError(error.code, f"{path}: {error.message}", error.hint) from error
    _check_sockets({"socket": config.socket, "http.socket": config.http.socket}, path)
    _check_broker(config.broker, path)
    if config.nats and config.root is None:
        raise ConfigError(
            "no_root",
            f"{path}: root: missing; with a broker, releases are checked against a trusted root",
            'add root = "root.json", the file 1.root.json that the publisher gave you',
        )
    return config


def _check_broker(broker: BrokerConfig, path: Path) -> None:
    if broker.key and broker.credentials:
        raise ConfigError(
            "two_identities",
            f"{path}: broker: key and credentials are both given",
            "a device is known by one of them; leave the other out",
        )
    if (broker.tls_cert is None) != (broker.tls_key is None):
        raise ConfigError(
            "half_a_certificate",
            f"{path}: broker: tls_cert and tls_key go together",
            "name the certificate that the broker asks for, and its private key",
        )


def _check_sockets(sockets: dict[str, Path | None], path: Path) -> None:
    for key, socket in sockets.items():
        if socket is not None and len(str(socket).encode()) > SOCKET_BYTES_MAX:
            raise ConfigError(
                "socket_too_long",
                f"{path}: {key}: {socket} is longer than {SOCKET_BYTES_MAX} bytes",
                "put the socket into a folder with a shorter name, such as /run/headwater",
            )
    if sockets["socket"] == sockets["http.socket"]:
        raise ConfigError(
            "socket_taken",
            f"{path}: http.socket: {sockets['http.socket']} is where the device's own socket is",
            'choose another name, such as socket = "http.sock" under [http]',
        )
