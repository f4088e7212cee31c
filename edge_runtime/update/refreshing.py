"""The newest signed metadata, loaded by python-tuf and judged by a time that can be trusted.

Why: python-tuf judges expiry by a clock, and a device's clock may say anything. Here it is given a
time that is never below what was signed; a clock that looks wrong is settled by a signed answer.

Invariants: what looks expired is believed only at a signed time; who may sign it is learned beside
the cache, from metadata that is believed in nothing else. A clock behind what was signed is no
time. Metadata below the floor is refused, whatever the cache says.

Knows nothing about plans, packages or what runs. Reads one private attribute of python-tuf
(`_trusted_set`: versions, time of reference), which tests/integration/test_release_path.py pins.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Timestamp  # type: ignore[attr-defined] # no __all__
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.updater import Updater

from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError, TrustError
from edge_runtime.update import trust
from edge_runtime.update.fetcher import Fetcher
from edge_runtime.update.timekeeper import Keys, signed_time_s, time_keys

Ask = Callable[[bytes], bytes]

_CODES: list[tuple[type[Exception], type[HeadwaterError], str]] = [
    (tuf_errors.ExpiredMetadataError, TrustError, "expired"),
    (tuf_errors.BadVersionNumberError, TrustError, "rolled_back"),
    (tuf_errors.UnsignedMetadataError, TrustError, "below_threshold"),
    (tuf_errors.LengthOrHashMismatchError, TrustError, "hash_mismatch"),
    (tuf_errors.RepositoryError, TrustError, "bad_metadata"),
    (tuf_errors.DownloadLengthMismatchError, TrustError, "wrong_length"),
    (tuf_errors.DownloadHTTPError, TransportError, "absent"),
    (tuf_errors.SlowRetrievalError, TransportError, "too_slow"),
    (tuf_errors.DownloadError, TransportError, "unreachable"),
    (OSError, CapacityError, "state_unwritable"),
]
_TIME_S_MAX = 253_402_300_799.0  # the end of year 9999: no date is later
_HINTS = {"expired": "it is signed afresh while cloud-learner serve runs; root and targets yearly"}
_LIMITS = UpdaterConfig(max_delegations=8, snapshot_max_length=512_000, targets_max_length=1 << 20)


class Refreshing:
    """Loads what `fetcher` brings into the cache `directory`, beginning at the root `root_bytes`.

    `ask_time` puts a question of the time to whoever answers; without it `clock` is believed.
    """

    def __init__(
        self,
        directory: Path,
        root_bytes: bytes,
        fetcher: Fetcher,
        clock: Clock,
        ask_time: Ask | None,
    ) -> None:
        self._directory, self._root_bytes, self._fetcher = directory, root_bytes, fetcher
        self._clock, self._ask_time = clock, ask_time
        self._set_up_s: float | None = None

    def load(self, floor: trust.Floor) -> tuple[Updater, float]:
        """The newest metadata, and the time by which it was judged.

        Raises: as `UpdateClient.refresh`.
        """
        clock_s, lowest_s = self._clock.now_s(), trust.lowest_time_s(floor, self._root_issued_s())
        now_s = max(clock_s, lowest_s)
        try:
            updater = self._loaded(floor, now_s, self._directory)
        except TrustError as error:
            if error.code != "expired" or self._ask_time is None:
                raise
            now_s = self._settled(floor, lowest_s, error)
            return self._loaded(floor, now_s, self._directory), now_s
        issued_s, keys = issued_at(trusted(updater).timestamp), time_keys(trusted(updater).targets)
        if keys and self._ask_time and trust.is_behind(clock_s, max(lowest_s, issued_s)):
            now_s = max(lowest_s, self._asked(keys, "clock_behind", "the clock is behind"))
            trust.check_issued(issued_s, now_s)
            updater = self._loaded(floor, now_s, self._directory)
        return updater, now_s

    def _loaded(self, floor: trust.Floor, now_s: float, directory: Path) -> Updater:
        with ours("the signed metadata"):
            updater = Updater(
                str(directory),
                self._fetcher.base_url,
                fetcher=self._fetcher,
                config=_LIMITS,
                bootstrap=self._root_bytes,
            )
            latest_s = min(now_s, _TIME_S_MAX)
            trusted(updater).reference_time = dt.datetime.fromtimestamp(latest_s, dt.UTC)
            root_version = floor.versions.get("root", 1)
            self._fetcher.prefetch([f"{root_version + 1}.root.json", "timestamp.json"])
            updater.refresh()
        trust.check_versions(floor, versions(updater), online(updater))
        return updater

    def _settled(self, floor: trust.Floor, lowest_s: float, expired: TrustError) -> float:
        """The signed time where all looks expired, for the clock may be ahead."""
        with ours("the time"), tempfile.TemporaryDirectory(prefix="headwater-") as aside:
            keys = time_keys(trusted(self._loaded(floor, lowest_s, Path(aside))).targets)
        if not keys:
            raise expired
        return max(lowest_s, self._asked(keys, "expired", str(expired.__cause__)))

    def _asked(self, keys: Keys, code: str, why: str) -> float:
        assert self._ask_time is not None
        try:
            return signed_time_s(self._ask_time, keys)
        except (TrustError, tuf_errors.DownloadError) as error:
            reason = error.message if isinstance(error, TrustError) else str(error)
            raise TrustError(
                code,
                f"{why}, and nobody says what time it is ({reason}); nothing is installed, what "
                "runs goes on",
                "set the device's clock, or see that cloud-learner serve runs and answers hw.time",
            ) from error

    def _root_issued_s(self) -> float:
        """When the root was issued that this device was given when it was set up."""
        if self._set_up_s is None:
            with ours("the trusted root"):
                self._set_up_s = issued_at(Metadata[Root].from_bytes(self._root_bytes).signed)
        return self._set_up_s


def trusted(updater: Updater) -> TrustedMetadataSet:
    """What an updater has verified."""
    return updater._trusted_set  # noqa: SLF001 - versions and time have no public access


def versions(updater: Updater) -> dict[str, int]:
    """The version of each role that was verified, or that the snapshot lists."""
    found = trusted(updater)
    listed = {
        name.removesuffix(".json"): entry.version for name, entry in found.snapshot.meta.items()
    }
    return listed | {
        "root": found.root.version,
        "timestamp": found.timestamp.version,
        "snapshot": found.snapshot.version,
    }


def online(updater: Updater) -> str:
    """The ids of the keys that vouch for the versions."""
    roles = trusted(updater).root.roles
    return " ".join(sorted(key for role in trust.ONLINE for key in roles[role].keyids))


def issued_at(document: Timestamp | Root) -> float:
    """The signed time of issue; 0 where it is not said."""
    issued = document.unrecognized_fields.get(trust.ISSUED_FIELD, 0)
    return float(min(max(0, issued), _TIME_S_MAX)) if isinstance(issued, int | float) else 0.0


@contextmanager
def ours(what: str) -> Iterator[None]:
    """Turn python-tuf's and the disk's errors into ours, with the attack's name as code."""
    try:
        yield
    except HeadwaterError:
        raise
    except Exception as error:
        for kind, family, code in _CODES:
            if isinstance(error, kind):
                text = f"{what}: {error}; what runs is unchanged"
                raise family(code, text, _HINTS.get(code, "")) from error
        raise
