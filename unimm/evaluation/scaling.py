"""What a code costs where more pictures are drawn at once, and where a picture has more codes.

In: a way to draw so many pictures of so many codes. Out: pictures per second and milliseconds per code, beside a single
picture and beside the shortest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from unimm.evaluation.timing import Speed, Way, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCHES = (1, 2, 4, 8, 16)  # pictures drawn at once
BATCHED_CODES = 256  # of each of them
LENGTHS = (64, 256, 1_024, 4_096)  # codes of a picture drawn alone
HEADER = "| pictures per second | {} | ms per code | range | floor, ms | times the floor |"


@dataclass(frozen=True)
class ScalingPoint:
    """Drawing `batch` pictures of `codes` codes at once; the unit of `speed` is one code of one picture."""

    batch: int
    codes: int
    pictures_per_second: float
    speed: Speed

    def row(self, ratio: float) -> str:
        """Cells that `HEADER` names."""
        speed = self.speed
        assert speed.floor is not None
        return (
            f"| {self.pictures_per_second:.3f} | {ratio:.2f} | {speed.milliseconds:.3f} | {speed.lowest:.3f} to "
            f"{speed.highest:.3f} | {speed.floor:.3f} | {speed.milliseconds / speed.floor:.2f} |"
        )


@dataclass(frozen=True)
class Scaling:
    """Points over the number of pictures and over the number of codes, each list with its own first as measure."""

    batches: tuple[ScalingPoint, ...]
    lengths: tuple[ScalingPoint, ...]

    def to_markdown(self) -> str:
        """A table over batches and one over lengths."""
        first, shortest = self.batches[0], self.lengths[0]
        lines = [
            f"| pictures at once, of {first.codes} codes " + HEADER.format(f"times batch {first.batch}"),
            "|---" * 7 + "|",
            *(f"| {point.batch} " + point.row(point.speed.speedup) for point in self.batches),
            "",
            "| codes of a picture " + HEADER.format(f"cost over {shortest.codes} codes"),
            "|---" * 7 + "|",
            *(f"| {point.codes} " + point.row(1 / point.speed.speedup) for point in self.lengths),
        ]
        return "\n".join(lines)

    def plot(self, over_batches: Axes, over_lengths: Axes) -> None:
        """Pictures per second over batches, milliseconds per code over lengths; floors dashed."""
        batches, lengths = [point.batch for point in self.batches], [point.codes for point in self.lengths]
        first = self.batches[0]
        over_batches.plot(batches, [point.pictures_per_second for point in self.batches], marker="o", label="engine")
        linear = [first.pictures_per_second * batch / first.batch for batch in batches]
        over_batches.plot(batches, linear, linestyle=":", color="black", label="in proportion")
        over_batches.set(xlabel=f"pictures at once, of {first.codes} codes", ylabel="pictures per second")
        over_lengths.plot(lengths, [point.speed.milliseconds for point in self.lengths], marker="o", label="engine")
        floors = [point.speed.floor or 0.0 for point in self.lengths]
        over_lengths.plot(lengths, floors, linestyle="--", color="black", label="floor")
        over_lengths.set(xlabel="codes of a picture", ylabel="ms per code", ylim=(0, None))
        for axis, places in ((over_batches, batches), (over_lengths, lengths)):
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, [str(place) for place in places])
            axis.legend()


def measure_scaling(
    draw: Callable[[int, int], object],
    floor: Callable[[int, int], float],
    *,
    most: int,
    clock: Callable[[], float],
    rounds: int,
) -> Scaling:
    """Time both lists, the points of each taking turns.

    Args:
        draw: draws a batch of pictures of so many codes.
        floor: seconds below which no step of such a drawing can be, in the mean over its codes.
        most: codes that a picture can have.
        clock, rounds: see `compare`.
    """

    def points(task: str, sizes: Sequence[tuple[int, int]]) -> tuple[ScalingPoint, ...]:
        ways = [
            Way(
                f"{batch} of {codes} codes",
                partial(draw, batch, codes),
                batch * codes,
                floor(batch, codes) / batch,
            )
            for batch, codes in sizes
        ]
        speeds = compare(task, "code", ways, clock, rounds)
        return tuple(
            ScalingPoint(batch, codes, 1000 / (codes * speed.milliseconds), speed)
            for (batch, codes), speed in zip(sizes, speeds, strict=True)
        )

    return Scaling(
        batches=points("batches", [(batch, min(BATCHED_CODES, most)) for batch in BATCHES]),
        lengths=points("lengths", [(1, codes) for codes in sorted({min(codes, most) for codes in LENGTHS})]),
    )
