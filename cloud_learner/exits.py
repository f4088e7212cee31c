"""How a command ends: errors become their text and an exit code.

Why: scripts read exit codes; each kind of error has one, whichever command met it.

Invariants: 0 ok, 1 failure, 2 usage or configuration, 3 a gate or the campaign refused, 4
unreachable. What is not
an error of ours or of the system is a defect, and comes out as it is.

Knows nothing about commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import click

from edge_runtime.errors import ConfigError, HeadwaterError, RequestError, TransportError

T = TypeVar("T")

INTERRUPTED = "Query interrupted"
"""What DuckDB makes of a Ctrl-C that comes while it runs."""


def guarded(call: Callable[[], T]) -> T:
    """The result of `call`; an error becomes its text on stderr and the end of the process."""
    try:
        return call()
    except (HeadwaterError, OSError) as error:
        _fail([error])
    except RuntimeError as error:
        if str(error) != INTERRUPTED:
            raise
        raise KeyboardInterrupt from error
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
    if isinstance(error, HeadwaterError) and error.code in {"gate_refused", "campaign_refused"}:
        return 3
    if isinstance(error, ConfigError | RequestError):
        return 2
    return 4 if isinstance(error, TransportError) else 1


def tell(text: str) -> None:
    """Narrate, to stderr."""
    click.echo(text, err=True)
