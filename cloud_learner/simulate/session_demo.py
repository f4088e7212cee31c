"""The session demo: a page on this machine whose ranking adapts to whoever clicks.

Why: what a session is can be felt in a minute, and hardly be told. The model is real: bootstrapped
from simulated visits, gated and signed, and opened by the device's own runtime.

Invariants: what was learned is kept and serves the next start. What is clicked stays in memory and
in a log that ends with the process. Ctrl-C and SIGTERM end it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

from rich.console import Console

from cloud_learner.config import Home
from cloud_learner.simulate.front_page import FrontPage
from cloud_learner.simulate.page_server import PageServer
from cloud_learner.store.registry import Registry
from cloud_learner.train.modules import load_module
from edge_runtime.errors import ConfigError
from edge_runtime.runtime import Runtime

FAMILY = Path("models/session_ranker")

Say = Callable[[str], None]


def run(var: Path, port: int, *, tell: Say, say: Say) -> None:
    """Serve the page until a signal comes; `say` is told its address, `tell` what goes on.

    Raises: ConfigError for a port that is taken, or outside of the checkout; HeadwaterError when
    the model cannot be learned.
    """
    if not FAMILY.is_dir():
        raise ConfigError("no_family", f"{FAMILY} is not here", "run it from the checkout's root")
    simulator, names = (load_module(FAMILY / f"{name}.py") for name in ("simulator", "headlines"))
    page = resources.files(__package__).joinpath("session_page.html").read_bytes()
    with PageServer(port, page) as server, Runtime.open(package=_package(var, tell)) as runtime:
        server.answers = FrontPage(runtime, simulator, names.headlines).answers()
        _serve(server, tell, say)
    tell("all sessions are forgotten")


def _package(var: Path, tell: Say) -> Path:
    """The family's first release, learned by the first start."""
    home = Home(var / "cloud")
    if FAMILY.name in home.families():
        tell(f"the model that an earlier start has learned; remove {var} to learn it anew")
    else:
        tell(f"first start: the model is learned, and kept in {var}")
        _learn(var / "visits.csv", home, tell)
    return Registry(home.registry).path(home.of(FAMILY.name).origin().sha256)


def _learn(data: Path, home: Home, tell: Say) -> None:
    data.parent.mkdir(parents=True, exist_ok=True)
    rows = load_module(FAMILY / "data.py").write_data(data)
    tell(f"{rows:,} stories that simulated visitors looked at: {data}")
    console = Console(stderr=True, markup=False, highlight=False)
    with console.status("learning, for about half a minute"):
        from cloud_learner.bootstrap import bootstrap  # torch, of which serving has no need

        bootstrap(FAMILY, data, home, partial(console.print, soft_wrap=True))


def _serve(server: PageServer, tell: Say, say: Say) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # also where who started it ignores them
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        say(server.url)
        tell("open it in a browser; Ctrl-C ends it")
        server.serve_forever()
