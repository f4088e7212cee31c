"""Who may come in to the broker: each device with its own key, and the learner with its own.

Why: a device speaks for itself alone. The broker holds each connection to its key, and the learner
takes the device from the subject; together nobody can speak for another.

How: every device has an account of its own, a world in which only that device lives, with doors to
the learner's account for exactly its subjects. Permissions alone would not do: a broker checks the
subject that is published on and not the one that an answer is sent to, so a device could have the
broker itself write an answer onto another's subject, or onto the stream API. In an account
of its own such an answer ends before its own doors.

Invariants: one key per device and one device per key. What the file says is what a running broker
knows when `admit` or `expel` returns; who stays admitted stays connected.

A gate that has moved out has a key of its own in the learner's account, which may read the stream,
fetch candidates and answer, and nothing else: no device hears it.

Durable state: `devices.json`; the commit point is its rename. The learner's seed, `learner.nk`; the
gate's public key, `gate.pub`.
Knows nothing about what devices say.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from cloud_learner import broker
from cloud_learner.config import Home
from edge_runtime.bus import nkey
from edge_runtime.bus.access import Access
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import write_atomic
from edge_runtime.wire import subjects

GATE_KEY = "gate.nk"
_DIRECT_GET = "$JS.API.DIRECT.GET"


class _Admitted(msgspec.Struct, frozen=True):
    version: int
    devices: dict[str, str]


class Admissions:
    """The keys that a learner's home admits."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._path = home.root / "devices.json"
        self._read: tuple[tuple[int, int] | None, dict[str, str]] = None, {}

    @property
    def devices(self) -> dict[str, str]:
        """The public key of each admitted device. Raises: ConfigError `bad_devices`."""
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Admitted)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            hint = "mend it, or move it away and admit the devices again"
            raise ConfigError("bad_devices", f"{self._path}: {error}", hint) from error
        return found.devices

    def known(self) -> dict[str, str]:
        """As `devices`, read anew only where the file was replaced; what cannot be read changes
        nothing.
        """
        with contextlib.suppress(OSError, ConfigError):
            found = os.stat(self._path)
            stamp = found.st_ino, found.st_mtime_ns
            if stamp != self._read[0]:
                self._read = stamp, self.devices
        return self._read[1]

    def admit(self, device: str, public_key: str, *, replace: bool = False) -> bool:
        """Let `device` in by this key; returns whether a running broker knows it already.

        With `replace`, it takes the place of the key that the device has.

        Raises: ConfigError (bad_name, bad_public_key, device_known, key_taken), nothing changed.
        """
        subjects.checked_name(device, "device")
        nkey.checked_public(public_key)
        with self._changing() as devices:
            owner = next((name for name, key in devices.items() if key == public_key), device)
            if owner != device:
                hint = "each device makes a key of its own: edge-runtime init there"
                raise ConfigError("key_taken", f"this is the key of {owner}", hint)
            if devices.get(device, public_key) != public_key and not replace:
                raise ConfigError(
                    "device_known",
                    f"{device} is admitted by another key, {devices[device]}; nothing was changed",
                    "--replace, if it was set up anew and the old key is gone",
                )
            devices[device] = public_key
        return self._applied()

    def expel(self, device: str) -> bool:
        """Let `device` in no more, and cut it off; returns whether a broker runs that did.

        Raises: ConfigError `unknown_device`.
        """
        with self._changing() as devices:
            if devices.pop(device, None) is None:
                hint = "cloud-learner devices lists them"
                raise ConfigError("unknown_device", f"{device} is not admitted", hint)
        return self._applied()

    def access(self) -> Access:
        """How the learner comes in: by its own key, which is made the first time."""
        path = self._home.learner_key
        if not path.exists():
            nkey.create(path)
        return Access(key=path)

    def rules(self) -> str:
        """The part of a server's configuration that admits the learner and these devices."""
        key = self.access().key
        assert key is not None
        return rules(nkey.load(key).public, self.devices, self._gate(), self._operators())

    def _gate(self) -> str:
        """The public key of a gate that has moved out, or nothing."""
        path = gate_public(self._home)
        return path.read_text().strip() if path.exists() else ""

    def _operators(self) -> dict[str, str]:
        """Operators come in by the key that signs their orders."""
        folder = self._home.operators
        return {path.stem: nkey.public_of(path.read_bytes()) for path in folder.glob("*.pub")}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, str]]:
        """The devices, to be changed; two commands at once go one after the other."""
        if not self._home.root.is_dir():
            hint = "cloud-learner bootstrap makes one; --home says where it is"
            raise ConfigError("no_home", f"{self._home.root}: no such folder", hint)
        fd = os.open(self._home.root / "devices.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            devices = self.devices
            yield devices
            key = self.access().key
            assert key is not None
            text = rules(nkey.load(key).public, devices, self._gate(), self._operators())
            write_atomic(self._path, msgspec.json.encode(_Admitted(1, devices)))
            if self._home.broker.exists():
                broker.write_access(self._home.broker, text)
        except OSError as error:
            raise CapacityError(
                "not_written", f"{self._home.root} cannot be written: {error}", "make room there"
            ) from error
        finally:
            os.close(fd)

    def _applied(self) -> bool:
        return broker.reload(self._home.broker)


def gate_public(home: Home) -> Path:
    """Where a learner's home keeps the public key by which its gate apart comes in."""
    return home.root / "gate.pub"


def gate_access(home: Home) -> Access:
    """How the gate comes in: by the key of its own home."""
    return Access(key=home.root / GATE_KEY, inbox="_INBOX_gate")


def operator_inbox(name: str) -> str:
    """Below this subject an operator's answers come."""
    return f"_INBOX_by_{name}"


def rules(
    learner_key: str,
    devices: Mapping[str, str],
    gate_key: str = "",
    operators: Mapping[str, str] = {},
) -> str:
    """`accounts` for the keys of a learner, of devices, of a gate apart and of operators."""
    worlds = "".join(_world(device, key) for device, key in sorted(devices.items()))
    gate = _GATE.format(key=gate_key, get=_DIRECT_GET) if gate_key else ""
    gate += "".join(
        _OPERATOR.format(key=key, inbox=operator_inbox(name))
        for name, key in sorted(operators.items())
    )
    return _ACCOUNTS.format(
        hub=broker.ACCOUNT, learner=learner_key, gate=gate, get=_DIRECT_GET, worlds=worlds
    )


def published(device: str) -> list[str]:
    """What a device may say to the learner's account, and ask there."""
    return [
        *(subjects.events(device, name) for name in ("event", "label")),
        subjects.report(device),
        f"{_DIRECT_GET}.{subjects.STATE_STREAM}.{subjects.watermark(device)}",
        f"{_DIRECT_GET}.{subjects.TRUST_STREAM}.>",
        subjects.TIME,
    ]


def heard(device: str) -> list[str]:
    """What a device may hear from the learner's account."""
    return [subjects.watermark(device), "hw.cmd.>", subjects.LEARNER_STATUS]


_ACCOUNTS = """\
accounts {{
  {hub} {{
    jetstream: enabled
    users: [ {{ nkey: {learner} }}{gate} ]
    exports: [
      {{ service: "hw.ev.*.*" }}
      {{ service: "hw.report.*" }}
      {{ service: "{get}.HW_STATE.hw.wm.*" }}
      {{ service: "{get}.HW_TRUST.>" }}
      {{ service: "hw.time" }}
      {{ stream: "hw.wm.*" }}
      {{ stream: "hw.cmd.>" }}
      {{ stream: "hw.status.learner" }}
    ]
  }}
{worlds}}}
"""

_GATE = """, {{ nkey: {key}, permissions: {{
      publish: ["hw.answer.*", "_INBOX_gate.>", "{get}.HW_CANDIDATES.>", "$JS.ACK.HW_EVENTS.gate.>",
        "$JS.API.CONSUMER.*.HW_EVENTS.gate", "$JS.API.CONSUMER.*.HW_EVENTS.gate.>",
        "$JS.API.CONSUMER.MSG.NEXT.HW_EVENTS.gate", "$JS.API.CONSUMER.LIST.HW_EVENTS"]
      subscribe: ["hw.gate.>", "_INBOX_gate.>"]
    }} }}"""

_OPERATOR = """, {{ nkey: {key}, permissions: {{
      publish: ["hw.submit.*", "hw.approve.*", "hw.candidate.>", "{inbox}.>"]
      subscribe: ["hw.answer.*", "hw.status.learner", "{inbox}.>"]
    }} }}"""

_WORLD = """\
  "device {device}" {{
    users: [ {{ nkey: {key}, permissions: {{ publish: {says}, subscribe: {hears} }} }} ]
    imports: [
{doors}    ]
  }}
"""


def _world(device: str, key: str) -> str:
    inbox = f"{subjects.inbox(device)}.>"
    doors = [("service", subject) for subject in published(device)]
    doors += [("stream", subject) for subject in heard(device)]
    lines = (
        f'      {{ {kind}: {{ account: {broker.ACCOUNT}, subject: "{subject}" }} }}\n'
        for kind, subject in doors
    )
    return _WORLD.format(
        device=device,
        key=key,
        says=_texts([*published(device), inbox]),
        hears=_texts([*heard(device), inbox]),
        doors="".join(lines),
    )


def _texts(subjects_: list[str]) -> str:
    return msgspec.json.encode(subjects_).decode()
