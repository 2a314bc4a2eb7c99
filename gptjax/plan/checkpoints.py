"""The size of a run's checkpoints, how long they take to write, and how often to save them."""

import math
from dataclasses import dataclass

from gptjax.plan.estimate import Plan

DAY = 86400.0


@dataclass(frozen=True)
class Saving:
    """Checkpoints of a planned run.

    total: bytes of one. seconds: to write it, 0 where no bandwidth is known. interval: seconds
    between saves that lose the least time, 0 where failures or bandwidth are not known. lost: the
    fraction of the time that is then lost to saving and to steps done again.
    """

    total: float
    seconds: float
    interval: float
    lost: float


def saving(plan: Plan, bandwidth: float, failures: float) -> Saving:
    """The checkpoints of a plan, with storage that takes `bandwidth` bytes a second from all
    processes together (0: not known) and so many failures a day (0: not known)."""
    total = float(sum(math.prod(one.shape) * one.itemsize for one in plan.state))
    seconds = total / bandwidth if bandwidth else 0.0
    if not (failures and seconds):
        return Saving(total, seconds, 0.0, 0.0)
    interval = best_interval(seconds, DAY / failures)
    return Saving(total, seconds, interval, lost_share(interval, seconds, DAY / failures))


def best_interval(cost: float, between_failures: float) -> float:
    """Seconds of training between saves that lose the least time (Daly 2006, equation 37; the first
    term is Young's of 1974): `cost` are the seconds of a save, failures come at random."""
    if cost >= 2 * between_failures:
        return between_failures
    half = cost / (2 * between_failures)
    return math.sqrt(2 * cost * between_failures) * (1 + math.sqrt(half) / 3 + half / 9) - cost


def lost_share(interval: float, cost: float, between_failures: float) -> float:
    """The fraction of the time that saves and repeated steps take, with failures at random.

    Of a failure the restart itself is left out, as it is the same for any interval. Expected time
    for an interval and its save: M (exp((interval + cost) / M) - 1), M between failures.
    """
    m = between_failures
    return 1 - interval / (m * math.expm1((interval + cost) / m))
