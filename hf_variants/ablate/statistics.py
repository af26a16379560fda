"""What runs say: means, spreads, and how likely a difference is where there is none."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .plan import Expectation, Plan


# A difference counts from this corrected p-value on.
LEVEL = 0.05

Record = dict[str, Any]


def value_of(record: Record, metric: str) -> float:
    """A metric of one run; the loss of one that diverged is what it was before training."""
    name, _, size = metric.partition("@")
    if name in ("loss", "accuracy"):
        found = record["lengths"][size] if size else record["test"]
        if name == "loss":
            return _bounded(found["loss"], record)
        return found["accuracy"]
    if name == "step_ms":
        return record["step_ms"]
    first, last = record["probes"][0], record["probes"][-1]
    gradients = first["gradients"]
    return {
        "first_gradient": gradients[0],
        "last_gradient": gradients[-1],
        "gradient_ratio": gradients[0] / gradients[-1],
        "max_logit": last["max_logit"],
        "log_z": last["log_z_squared"],
    }[name]


def _bounded(loss: float, record: Record) -> float:
    initial = record["initial_loss"]
    return loss if math.isfinite(loss) and loss < initial else initial


class Results:
    """
    The runs of a plan.

    Args:
        plan: theirs.
        records: what `train_one` found, with `config`, `role`, `seed` and `learning_rate`.
    """

    def __init__(self, plan: Plan, records: list[Record]):
        self.plan, self.records = plan, records

    def of(self, name: str, role: str = "main", learning_rate: float | None = None) -> list[Record]:
        """Runs of a config at one learning rate, by default its best, in the order of seeds."""
        rate = self.best_rate(name) if learning_rate is None else learning_rate
        return sorted(
            (
                each
                for each in self.records
                if (each["config"], each["role"], each["learning_rate"]) == (name, role, rate)
            ),
            key=lambda each: each["seed"],
        )

    def best_rate(self, name: str) -> float:
        """The learning rate with the least mean loss on the validation part."""
        means = {
            rate: np.mean([_bounded(each["validation"]["loss"], each) for each in self.of(name, learning_rate=rate)])
            for rate in self.plan.learning_rates
        }
        return min(means, key=lambda rate: means[rate])

    def values(self, name: str, metric: str = "loss", role: str = "main") -> np.ndarray:
        """(seeds,) float64."""
        if metric == "sensitivity":
            # (rates, seeds)
            losses = np.array(
                [
                    [value_of(each, "loss") for each in self.of(name, learning_rate=rate)]
                    for rate in self.plan.learning_rates
                ]
            )
            return (losses - losses.min(0)).mean(0)
        # The control's learning rate is the reference's.
        return np.array([value_of(each, metric) for each in self.of(name, role)])

    def noise_band(self, metric: str = "loss") -> float | None:
        """
        Half the width of the interval that holds the difference of two means over the plan's seeds in 95 of 100 cases where
        both are of the reference, from the spread of all its runs; `None` without such runs.
        """
        if not self.plan.noise or metric == "sensitivity":
            return None
        both = [self.values(self.plan.reference, metric, role) for role in ("main", "noise")]
        if any(len(each) < 2 for each in both):
            return None
        degrees = sum(len(each) - 1 for each in both)
        variance = sum(each.var(ddof=1) * (len(each) - 1) for each in both) / degrees
        return float(stats.t.ppf(1 - LEVEL / 2, degrees) * math.sqrt(variance * sum(1 / len(each) for each in both)))

    def comparisons(self) -> list["Comparison"]:
        """All that the plan compares, their p-values corrected together by Holm's method."""
        found = [self._compare(expectation) for expectation in self.plan.expectations()]
        for comparison, corrected in zip(found, holm([each.p for each in found]), strict=True):
            comparison.corrected = corrected
        return found

    def _compare(self, expectation: Expectation) -> "Comparison":
        less, than = (self.values(name, expectation.metric) for name in (expectation.less, expectation.than))
        difference = less - than
        return Comparison(
            expectation, float(less.mean()), float(than.mean()), float(difference.mean()),
            float(difference.std(ddof=1)), p_value(difference, self.plan.test), self.noise_band(expectation.metric),
        )  # fmt: skip

    def noise_comparison(self) -> tuple[float, float] | None:
        """The reference's difference from itself with other seeds, paired in order, and its p-value."""
        both = [self.values(self.plan.reference, "loss", role) for role in ("noise", "main")]
        if not self.plan.noise or len(both[0]) != len(both[1]):
            return None
        difference = both[0] - both[1]
        return float(difference.mean()), p_value(difference, self.plan.test)


@dataclass
class Comparison:
    """
    Two configs, seed by seed.

    Attributes:
        expectation: what was asked.
        less, than: their means.
        difference: mean of the first minus the second; `spread`: its standard deviation over seeds.
        p: two-sided; `corrected`: for all comparisons of the plan.
        noise: see `Results.noise_band`.
    """

    expectation: Expectation
    less: float
    than: float
    difference: float
    spread: float
    p: float
    noise: float | None
    corrected: float = math.nan

    @property
    def is_distinguished(self) -> bool:
        """Whether the difference, seed by seed, is beyond chance after correction."""
        return self.corrected < LEVEL

    @property
    def is_within_noise(self) -> bool:
        """Whether it is no larger than what seeds alone do: it would not be seen without pairs."""
        return self.noise is not None and abs(self.difference) <= self.noise

    @property
    def outcome(self) -> str:
        """In a few words."""
        if not self.is_distinguished:
            return "not at this scale" if self.expectation.expected else "no difference shown"
        if self.expectation.expected:
            found = "agrees" if self.difference < 0 else "the opposite"
        else:
            found = "less" if self.difference < 0 else "more"
        return f"{found}, by less than seeds alone do" if self.is_within_noise else found


def p_value(difference: np.ndarray, test: str) -> float:
    """Two-sided, of paired differences (seeds,) whose mean, or median, would be 0."""
    if not difference.any():
        return 1.0
    if test == "paired-t":
        return float(stats.ttest_1samp(difference, 0.0).pvalue) if np.ptp(difference) else 0.0
    if test == "wilcoxon":
        return float(stats.wilcoxon(difference).pvalue)
    found = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)


def holm(values: list[float]) -> list[float]:
    """p-values as they stand when all are looked at together (Holm 1979, https://www.jstor.org/stable/4615733)."""
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.array(values)[order] * factors), 1.0)
    return corrected.tolist()
