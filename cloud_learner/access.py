"""How a command comes in to a broker: its options, and the home's own key where they name none.

Why: every command that speaks with a running learner comes in the same way.

Invariants: an option that is given wins.

Knows nothing about what is said there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from cloud_learner.config import Home
from edge_runtime.bus.access import Access

HOME = click.option(
    "--home", type=click.Path(path_type=Path), default=Path("var/cloud"), help="The learner's home."
)


def by_key(command: Callable[..., None], *, own: str = "--key") -> Callable[..., None]:
    """The options that say how to come in to a broker; `own` names the one for a key."""
    options = {
        own: "The seed of an nkey; by default the home's own.",
        "--credentials": "A .creds file, in place of a key.",
        "--tls-ca": "Who vouches for the broker; by default the system's authorities.",
        "--tls-cert": "A certificate for a broker that asks for one.",
        "--tls-key": "Its private key.",
    }
    for name, text in reversed(options.items()):
        names = (name, "key") if name == own else (name,)
        command = click.option(*names, type=click.Path(path_type=Path), help=text)(command)
    return command


def access(home: Path, files: dict[str, Path | None]) -> Access:
    """How to come in: as the options say, with the home's own key where they name none."""
    own = Home(home).learner_key
    if not files["key"] and not files["credentials"] and own.exists():
        files["key"] = own
    return Access(
        key=files["key"],
        credentials=files["credentials"],
        tls_ca=files["tls_ca"],
        tls_cert=files["tls_cert"],
        tls_key=files["tls_key"],
    )
