"""Ways to do one task take turns on a clock, beside what the machine allows.

In: functions that do a task once. Out: milliseconds per unit of each. Every round goes through all ways in order, so
that other work on the machine meets all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

READ_BYTES = {"cpu": 2**28, "cuda": 2**32}  # many times the last cache
PRODUCT = 1_024


@dataclass(frozen=True)
class Way:
    """One way to do a task.

    Args:
        name: of the way.
        run: does it once.
        units: how many units one run does.
        floor: seconds per unit below which no way of this precision can be; None where nothing is said.
        begin: does only the first units, `begun` of them, for a way that stops early: what that takes beyond its units
            is spread over `whole` units.
        whole: units of a run that would not stop.
        begun: units by which everything that happens once has happened.
    """

    name: str
    run: Callable[[], object]
    units: int
    floor: float | None = None
    begin: Callable[[], object] | None = None
    whole: int = 0
    begun: int = 1

    def seconds(self, clock: Callable[[], float]) -> float:
        """Of one unit."""
        if self.begin is None or self.units == self.whole:
            return _seconds(self.run, clock) / self.units
        first, taken = _seconds(self.begin, clock), _seconds(self.run, clock)
        each = (taken - first) / (self.units - self.begun)
        return (first + (self.whole - self.begun) * each) / self.whole


@dataclass(frozen=True)
class Speed:
    """What was measured of one way.

    Args:
        task, way: what, and how.
        unit: of what.
        milliseconds: per unit, median over the rounds.
        lowest, highest: of the rounds.
        speedup: over the first way of the task, median of the rounds' ratios.
        floor: milliseconds per unit that bandwidth and arithmetic of this run allow; None where nothing is said.
    """

    task: str
    way: str
    unit: str
    milliseconds: float
    lowest: float
    highest: float
    speedup: float
    floor: float | None


@dataclass(frozen=True)
class Machine:
    """What this run finds the machine to be.

    Args:
        bandwidth: bytes per second of reading memory.
        flops: per second of a large float32 product.
        clock: processor seconds for one thread, which other work disturbs little, else seconds of the wall.
    """

    bandwidth: float
    flops: float
    clock: Callable[[], float]

    @classmethod
    def measure(cls, device: torch.device) -> Machine:
        """Read a large block and multiply two large matrices, a few times each."""
        single = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if single else time.perf_counter
        number = READ_BYTES.get(device.type, READ_BYTES["cpu"])
        block = torch.ones(number // 4, device=device)
        square = torch.ones(PRODUCT, PRODUCT, device=device)
        reading = min(_seconds(lambda: block.sum().item(), clock) for _ in range(5))
        multiplying = min(_seconds(lambda: (square @ square)[0, 0].item(), clock) for _ in range(5))
        return cls(number / reading, 2 * PRODUCT**3 / multiplying, clock)


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begin


def compare(task: str, unit: str, ways: Sequence[Way], clock: Callable[[], float], rounds: int) -> list[Speed]:
    """Let the ways take turns; the first run of each is not counted."""
    for way in ways:
        way.run()
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, taken, strict=True):
            times.append(1000 * way.seconds(clock))
    return [
        Speed(
            task=task,
            way=way.name,
            unit=unit,
            milliseconds=statistics.median(times),
            lowest=min(times),
            highest=max(times),
            speedup=statistics.median(first / own for first, own in zip(taken[0], times, strict=True)),
            floor=None if way.floor is None else 1000 * way.floor,
        )
        for way, times in zip(ways, taken, strict=True)
    ]
