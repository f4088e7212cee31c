"""The commands of `cloud-learner` that look back at what a home has kept; `cli` has all of them.

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
