"""The prior: what the cloud knows of sessions in general before one begins.

Why: a head that starts from what past sessions had in common is useful from the second interaction
on; one that starts from nothing needs as many labels as the embedding is wide.

A head's shift is `weights @ [1, embedding]`: weight 0 is the running bias. The weights of a session
are drawn from a normal distribution with `mean` and `covariance`. Where tastes drift they move from
label to label and stay of that distribution (Ornstein and Uhlenbeck 1930): what is believed of them
goes back to it by the share `forgetting`.

Invariants: a prior that exists can be used: bounded numbers, a symmetric covariance with positive
eigenvalues. The same prior has the same bytes and the same `digest`; bytes that are no prior are
refused with `bad_prior`.

Knows nothing about sessions, packages or how a prior is learned. Formats: `PRIOR_VERSION`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import PackageError

Vector = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float32]
Task = Literal["binary", "regression", "ranking"]

PRIOR_VERSION: Final = 1
WIDTH_MAX = 512
"""The widest embedding; a session of it holds a megabyte."""

NORM_MAX, WEIGHT_MAX = 1e6, 1e6
"""The longest embedding that a prior may allow, and the largest number in it: what a head makes of
both is a float32."""

_VARIANCE_MIN = 1e-6  # of the largest one: less is float32's own

PATIENCE = math.log(100.0)
"""An honest session is taken for nonsense with a probability of at most 1 in 100."""


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    version: Literal[1]
    task: Task
    region: float
    norm_max: float
    noise: float
    patience: float
    mean: bytes
    covariance: bytes
    forgetting: float = 0.0


_decoder = msgspec.msgpack.Decoder(_Stored)


@dataclass(frozen=True, eq=False)
class Prior:
    """What each head of one release starts from.

    `mean` has shape (1 + width,), `covariance` (1 + width, 1 + width), both float32. `region` is
    the trust region, the largest shift there is: in units of the label for `regression`, in log
    odds for `binary` and `ranking`. `noise` is the variance of a label around the right answer;
    only `regression` has a use for it. From embeddings longer than `norm_max` nothing is learned.
    A session falls back when the log of the odds against its head exceeds `patience`. `forgetting`
    lies in [0, 1).

    Raises: PackageError `bad_prior`.
    """

    task: Task
    mean: Vector
    covariance: Matrix
    region: float
    norm_max: float
    noise: float = 1.0
    patience: float = PATIENCE
    forgetting: float = 0.0

    def __post_init__(self) -> None:
        if why := self._why_unfit():
            raise PackageError(
                "bad_prior",
                f"the prior of sessions cannot be used: {why}; sessions answer as the model does",
                "build the package again with the learner of this version",
            )

    def _why_unfit(self) -> str:
        if self.task not in get_args(Task):
            return f"its task is {self.task!r}"
        if self.mean.ndim != 1 or not 1 < len(self.mean) <= 1 + WIDTH_MAX:
            return f"its mean has shape {self.mean.shape}"
        if self.covariance.shape != (len(self.mean), len(self.mean)):
            return f"its covariance has shape {self.covariance.shape}"
        if not all((np.abs(each) <= WEIGHT_MAX).all() for each in (self.mean, self.covariance)):
            return f"it has numbers that are not within {WEIGHT_MAX:g}"
        if not (self.covariance == self.covariance.T).all():
            return "its covariance is not symmetric"
        if not (0 < self.region < math.inf and 0 < self.noise < math.inf):
            return f"its region is {self.region} and its noise {self.noise}"
        if not (0 < self.norm_max <= NORM_MAX and self.patience > 0):
            return f"its norm_max is {self.norm_max} and its patience {self.patience}"
        if not 0 <= self.forgetting < 1:
            return f"its forgetting is {self.forgetting}"
        if np.linalg.eigvalsh(self.covariance.astype(np.float64))[0] <= 0:
            return "its covariance has an eigenvalue that is not positive"
        return ""

    @property
    def width(self) -> int:
        """How many numbers an embedding has."""
        return len(self.mean) - 1

    @cached_property
    def digest(self) -> bytes:
        """Names the prior; what a session kept belongs to one of them."""
        return hashlib.sha256(self.encode()).digest()[:16]

    def relax(self, mean: Vector, covariance: Matrix) -> None:
        """Take what is believed back towards the prior, in place, by the share `forgetting`."""
        if self.forgetting:
            kept, (own_mean, own_covariance) = 1 - self.forgetting, self._pull
            np.add(np.multiply(mean, kept, mean), own_mean, mean)
            np.multiply(covariance, kept**2, covariance)
            np.add(covariance, own_covariance, covariance)

    @cached_property
    def _pull(self) -> tuple[Vector, Matrix]:
        kept = 1 - self.forgetting
        mean, covariance = (1 - kept) * self.mean, (1 - kept**2) * self.covariance
        return mean.astype(np.float32), covariance.astype(np.float32)

    @cached_property
    def whitener(self) -> npt.NDArray[np.float64]:
        """(1 + width, 1 + width): makes of a difference from the mean as many deviations, of which
        there is one in each direction.
        """
        covariance = self.covariance.astype(np.float64)
        floor = _VARIANCE_MIN * np.diagonal(covariance).max() * np.eye(len(covariance))
        return np.asarray(np.linalg.inv(np.linalg.cholesky(covariance + floor)))

    @cached_property
    def scratch(self) -> Scratch:
        """What all heads of this prior compute in; hence one thread at a time."""
        return Scratch(len(self.mean))

    def encode(self) -> bytes:
        """The prior as bytes; `decode` gives it back bit for bit."""
        return msgspec.msgpack.encode(
            _Stored(
                version=PRIOR_VERSION,
                task=self.task,
                region=float(self.region),
                norm_max=float(self.norm_max),
                noise=float(self.noise),
                patience=float(self.patience),
                mean=self.mean.astype("<f4").tobytes(),
                covariance=packed(self.covariance),
                forgetting=float(self.forgetting),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Prior:
        """The prior that was encoded. Raises: PackageError `bad_prior`."""
        try:
            stored = _decoder.decode(data)
            mean = np.frombuffer(stored.mean, "<f4").astype(np.float32)
            covariance = unpacked(stored.covariance, len(mean))
        except (msgspec.MsgspecError, ValueError) as error:
            raise PackageError(
                "bad_prior",
                f"the prior of sessions cannot be read: {error}; sessions answer as the model does",
                "build the package again with the learner of this version",
            ) from None
        return cls(
            stored.task,
            mean,
            covariance,
            stored.region,
            stored.norm_max,
            stored.noise,
            stored.patience,
            stored.forgetting,
        )


class Scratch:
    """Arrays of one label's arithmetic, made once; `row` and `column` share the memory of `pulled`.

    `features` is [1, embedding].
    """

    def __init__(self, size: int) -> None:
        self.features = np.ones(size, np.float32)
        self.embedding = self.features[1:]
        self.pulled = np.empty(size, np.float32)
        self.step = np.empty(size, np.float32)
        self.row, self.column = self.pulled.reshape(1, size), self.pulled.reshape(size, 1)
        self.square = np.empty((size, size), np.float32)


def packed(symmetric: Matrix) -> bytes:
    """The lower triangle, row by row, as little-endian float32."""
    return symmetric[np.tril_indices(len(symmetric))].astype("<f4").tobytes()


def unpacked(data: bytes, size: int) -> Matrix:
    """The symmetric matrix of (size, size) that was packed. Raises: ValueError."""
    triangle = np.frombuffer(data, "<f4")
    if len(triangle) != size * (size + 1) // 2:
        raise ValueError(f"a triangle of {len(triangle)} numbers is not one of {size} rows")
    matrix = np.zeros((size, size), np.float32)
    rows, columns = np.tril_indices(size)
    matrix[rows, columns] = matrix[columns, rows] = triangle
    return matrix
