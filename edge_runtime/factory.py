"""Setting a device up: the first configuration, and a package put on the shelf by hand.

Why: a device must be able to answer before it ever met a broker.

Invariants: an existing configuration is never written over; a package is proven (it loads, and its
golden samples come out right) before it becomes current. Its plan carries the reason `factory`
and counts as older than any signed one. A device's key is made once; its seed stays here.

Knows nothing about a running daemon: changes show at its next start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edge_runtime import config as configuration
from edge_runtime.bus import nkey
from edge_runtime.config import EdgeConfig
from edge_runtime.device.family import FACTORY
from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.files import write_atomic
from edge_runtime.inference.package import PackageInfo
from edge_runtime.inference.prover import Prover
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.plan import Plan, PlanArm, Variant, model_path
from edge_runtime.update.shelf import Shelf


def inspect(package: Path, *variants: Path) -> PackageInfo:
    """What a package says of itself, proven; `variants` are other forms of the same release.

    Raises: PackageError, also for a variant (bad_variants: it takes other events or features, or
    its file is named like another's).
    """
    with closing(Prover()) as prover:
        info, *others = (_proven(path, prover) for path in (package, *variants))
    if len({path.stem for path in (package, *variants)}) <= len(variants):
        raise PackageError(
            "bad_variants", "two variants have files of the same name; nothing is installed"
        )
    for path, other in zip(variants, others, strict=True):
        if (other.interface, other.spec) != (info.interface, info.spec):
            raise PackageError(
                "bad_variants",
                f"{path} takes other events or features than {package}; nothing is installed",
                "variants are forms of one model, such as int8 and float32",
            )
    return info


def _proven(package: Path, prover: Prover) -> PackageInfo:
    prover.prove(package)  # in a child, so that one that crashes or hangs is named
    info = load_arm(package, None, "stable", FACTORY, 1.0).info
    assert info is not None, "what has no metadata does not load as an arm"
    return info


def write_config(
    path: Path,
    info: PackageInfo | None,
    *,
    device: str | None,
    families: tuple[str, ...] = (),
    attributes: tuple[str, ...] = (),
    nats: str | None = None,
    root: str | None = None,
) -> EdgeConfig:
    """Write a configuration that serves `families` and the family of `info`, and load it.

    Raises: ConfigError, with nothing written.
    """
    named = dict.fromkeys([*families, *([info.family] if info is not None else [])])
    if device is None:
        raise ConfigError("no_device", "a new configuration needs a name", "add --device NAME")
    if not named:
        raise ConfigError(
            "no_family", "a new configuration needs a family", "add --family NAME or --package FILE"
        )
    lines = {
        "device": device,
        "families": list(named),
        "state_dir": "state",
        "socket": "edge.sock",
        **({"nats": nats} if nats else {}),
        **({"root": root} if root else {}),
    }
    text = "".join(f"{key} = {_toml(value)}\n" for key, value in lines.items())
    pairs = [_pair(each) for each in attributes]
    if pairs:
        text += "\n[attributes]\n" + "".join(f"{_toml(k)} = {_toml(v)}\n" for k, v in pairs)
    config = configuration.parse(text, path)
    write_atomic(path, text.encode())
    return config


def own_key(config: EdgeConfig) -> str:
    """The public key by which a broker knows the device; made where there is none yet.

    Raises: ConfigError as `nkey.load`, with the file unchanged.
    """
    path = config.broker.key or config.own_key
    return (nkey.load(path) if path.exists() else nkey.create(path)).public


def install(
    config: EdgeConfig, package: Path, info: PackageInfo, variants: Sequence[Path] = ()
) -> str:
    """Make `package` the current stable arm of its family; returns the release's name.

    Where it has `variants`, named after their files, the device chooses the fastest that is right
    at its next start.

    Raises: ConfigError (unknown_family; signed_release: a signed one came before;
    release_quarantined: it failed or was left here), CapacityError.
    """
    if info.family not in config.families:
        raise ConfigError(
            "unknown_family",
            f"{package} is of family {info.family!r}, which the configuration does not serve",
            f'add "{info.family}" to families',
        )
    shelf = Shelf(config.state_dir / "shelf")
    _refuse_left(shelf, [package, *variants])
    current = shelf.load_current(info.family)
    if current is not None and current.reason != FACTORY:
        raise ConfigError(
            "signed_release",
            f"{info.family} already follows signed plan {current.seq}; nothing was changed",
            "publish a release instead",
        )
    sha256, *others = (_put(shelf, path) for path in (package, *variants))
    release = f"{FACTORY}-{sha256[:12]}"
    own = Variant(package.stem, model_path(info.family, release), sha256)
    more = [
        Variant(path.stem, model_path(info.family, release, path.stem), each)
        for path, each in zip(variants, others, strict=True)
    ]
    arm = PlanArm(release, own.path, sha256, 0, 1.0, (own, *more) if more else ())
    shelf.save_current(Plan(family=info.family, seq=1, stable=arm, reason=FACTORY))
    return release


def _put(shelf: Shelf, package: Path) -> str:
    data = package.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    shelf.put_whole(sha256, data)
    return sha256


def _refuse_left(shelf: Shelf, packages: Sequence[Path]) -> None:
    left = shelf.quarantined()
    for path in packages:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 in left:
            raise ConfigError(
                "release_quarantined",
                f"{path} is in quarantine on this device ({left[sha256]}); nothing was changed",
                "publish a mended release, or take it out of shelf/quarantine.json",
            )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError("bad_attribute", f"{text!r} is no attribute", "write it as key=value")
    return key, value


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
