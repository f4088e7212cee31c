"""An anytime-valid test of failures: does the trial fail more often than what it would replace?

Why: of a failure that happened on a device where the trial answers a share of the requests, drawn
at random, one can ask whether the trial was the one that answered. The rate of failures itself, how
it differs between devices and how it changes over the day all fall out.

Method: conditional counting (Lindon & Malek, "Anytime-valid inference for multinomial count data",
NeurIPS 2022). If the trial fails at `ratio` times the rate, it has a failure with the chance
theta = share ratio / (share ratio + 1 - share), against `share` if it is no worse. The evidence is
the mean of the likelihood ratios over RATIOS; at 1/alpha the trial is harmful (Ville's inequality).
Where the share is that of the answers which were really given, failures are drawn from these
without replacement; of the likelihood ratio, which is convex, that has no larger mean than drawing
with replacement (Hoeffding 1963, theorem 4), so the test holds.

Invariants: the share of an `add` may differ from the next; a trial that fails no more often than
the other is called harmful with probability at most alpha, over all looks together; `harmful`
stays. In a large trial the evidence must stand without the devices that speak loudest for it, and
no device is counted for much more than its equal share of failures: a power below 1 of a likelihood
ratio has no larger mean either (Jensen).

Knows nothing about reports, arms or plans.
"""

from __future__ import annotations

import math

import msgspec

from cloud_learner.stats.trimming import liars, without_loudest

RATIOS = (1.5, 2.0, 10.0)
"""What the evidence is a mean over; fewer would see some ratio late, more cost all of them."""

# In a large trial a device counts for three failures, and three times its equal share of all.
SHARES_MAX = 3.0

# The ratios that the interval is made of, a quarter of an octave apart.
_CURVE = tuple(2.0 ** (step / 4) for step in range(-16, 25))


class Counted(msgspec.Struct, array_like=True):
    """One device's part: failures, and its logarithmic evidence for each of RATIOS."""

    failures: float = 0.0
    gains: list[float] = msgspec.field(default_factory=lambda: [0.0] * len(RATIOS))


class CountingTest(msgspec.Struct, kw_only=True):
    """The evidence of all devices; plain numbers, so it can be stored and go on.

    `trial` of the `failures` are the trial's, both as counted. `curve` is the logarithmic
    likelihood of each ratio of the interval, against that of equal rates.
    """

    alpha: float
    trial: float = 0.0
    failures: float = 0.0
    gains: list[float] = msgspec.field(default_factory=lambda: [0.0] * len(RATIOS))
    curve: list[float] = msgspec.field(default_factory=lambda: [0.0] * len(_CURVE))
    devices: dict[str, Counted] = {}
    harmful: bool = False
    look_at: float = 0.0

    def add(self, trial: int, failures: int, share: float, device: str, devices: int) -> bool:
        """Take `failures` of a device into account, of which the trial had `trial`.

        It answered `share` of that device's requests; `devices` are in the trial. Returns
        `harmful`.
        """
        assert 0 <= trial <= failures, f"{trial} of {failures} failures"
        assert 0 < share <= 1 or (share == 0 and trial == 0), f"share {share}"
        part = self.devices.setdefault(device, Counted())
        weight = self._weight(part, failures, devices)
        if weight > 0:
            own, both = weight * trial, weight * failures
            self.trial += own
            self.failures += both
            part.failures += both
            gains = [_gain(ratio, own, both, share) for ratio in RATIOS]
            part.gains = [old + gain for old, gain in zip(part.gains, gains, strict=True)]
            self.gains = [old + gain for old, gain in zip(self.gains, gains, strict=True)]
            self.curve = [
                old + _gain(ratio, own, both, share)
                for old, ratio in zip(self.curve, _CURVE, strict=True)
            ]
            self._look(liars(devices))
        return self.harmful

    def _weight(self, part: Counted, failures: int, devices: int) -> float:
        """The share of `failures` that is counted."""
        if not failures or not liars(devices):
            return float(failures > 0)
        room = SHARES_MAX * (1 + self.failures / devices) - part.failures
        return min(max(room / failures, 0.0), 1.0)

    def _look(self, left_out: int) -> None:
        """Leaving devices out looks at all of them, so not before one percent more is counted."""
        reach = -math.log(self.alpha)
        if self.harmful or self.failures < self.look_at or _mean(self.gains) < reach:
            return
        self.harmful = _mean(self._trimmed(left_out)) >= reach
        self.look_at = self.failures * 1.01

    def _trimmed(self, left_out: int) -> list[float]:
        return [
            without_loudest((part.gains[at] for part in self.devices.values()), left_out, total)
            for at, total in enumerate(self.gains)
        ]

    def evidence(self, devices: int) -> float:
        """The e-value against "no worse", without the loudest of `devices`."""
        return math.exp(min(_mean(self._trimmed(liars(devices))), 700.0))

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        """Between which ratios of the rates the true one lies, at all times, but for `alpha`.

        Exact to a fifth; (0, infinity) while nothing is known.
        """
        reach = _mean(self.curve) + math.log(alpha)
        kept = [at for at, value in enumerate(self.curve) if value > reach]
        low, high = kept[0] - 1, kept[-1] + 1
        return (
            _CURVE[low] if low >= 0 else 0.0,
            _CURVE[high] if high < len(_CURVE) else math.inf,
        )


def _gain(ratio: float, trial: float, failures: float, share: float) -> float:
    """The logarithm of the likelihood at `ratio`, against that at 1."""
    return trial * math.log(ratio) - failures * math.log(share * ratio + 1 - share)


def _mean(logs: list[float]) -> float:
    """The logarithm of the mean of what `logs` are the logarithms of."""
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs) / len(logs))
