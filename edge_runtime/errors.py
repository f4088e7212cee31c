"""Every error that Headwater raises on purpose, in families by who can act on it.

Why: a caller decides by family (retry, fix the request, keep the old model), a program by the
stable `code`, a person by the message and the `hint`. Foreign exceptions become one of these at the
seam where they enter, nowhere else.

Invariants: a `code` once published keeps its meaning; a message names the object that failed and
what is unchanged. Broken invariants of our own are assertions, never errors of this tree.
"""

from __future__ import annotations

from collections.abc import Iterator


class HeadwaterError(Exception):
    """Root of the tree; carries a stable `code`, a message and a `hint` for a person."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message} [{self.code}]"
        return f"{text}\nhint: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[type[HeadwaterError], tuple[str, str, str]]:
        return type(self), (self.code, self.message, self.hint)


class ConfigError(HeadwaterError):
    """The operator can mend it: a file, a key, an option."""


class RequestError(HeadwaterError):
    """The caller can mend it: a field, a type, a time, an unknown id."""


class PackageError(HeadwaterError):
    """The publisher can mend it: a package that a device cannot run."""


class TrustError(HeadwaterError):
    """Refused; the current model keeps serving."""


class TransportError(HeadwaterError):
    """The network or the broker failed; worth a retry."""


class CapacityError(HeadwaterError):
    """A bound is reached; shed load or wait."""


def each(errors: BaseExceptionGroup[HeadwaterError]) -> Iterator[HeadwaterError]:
    """The errors of a group and of the groups in it."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from each(error)
        else:
            yield error
