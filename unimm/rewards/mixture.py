"""Several rewards as one: each brought to [0, 1] by its own range, then weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unimm.rewards.base import Drawing, Reward


@dataclass(frozen=True)
class RewardMixture:
    """Rewards and their weights.

    Args:
        rewards: name to reward.
        weights: name to weight, of the same names.

    Raises:
        ValueError: no positive weight, or a name without reward.
    """

    rewards: dict[str, Reward]
    weights: dict[str, float]

    @classmethod
    def choose(cls, weights: Mapping[str, float], known: Mapping[str, Reward]) -> RewardMixture:
        """The rewards that `weights` names, out of those that are known.

        Raises:
            ValueError: an unknown name, a negative weight, or none that is positive.
        """
        unknown = [name for name in weights if name not in known]
        if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"rewards are {dict(weights)}; give positive weights to some of {', '.join(known)}.")
        return cls({name: known[name] for name in weights}, dict(weights))

    def scores(self, drawings: Sequence[Drawing]) -> dict[str, list[float | None]]:
        """Every reward of every drawing, each in its own range; None where it does not apply."""
        return {name: reward(drawings) for name, reward in self.rewards.items()}

    def total(self, drawings: Sequence[Drawing]) -> list[float | None]:
        """The weighted mean of the rewards that apply, in [0, 1]; None where none does."""
        scores = self.scores(drawings)
        totals: list[float | None] = []
        for index in range(len(drawings)):
            marks = [
                (self.weights[name], (value - reward.low) / (reward.high - reward.low))
                for name, reward in self.rewards.items()
                if (value := scores[name][index]) is not None
            ]
            weight = sum(share for share, _ in marks)
            totals.append(sum(share * mark for share, mark in marks) / weight if weight else None)
        return totals
