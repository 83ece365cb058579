"""Figures that show how a run stands."""

from collections.abc import Mapping


def level_gap(metrics: Mapping[str, float]) -> dict[str, float]:
    """How far the samples that are trained on lie above the level: in units of the reward, and of its deviation.

    Args:
        metrics: of an iteration; without a level there is no gap.
    """
    if "curriculum/level" not in metrics:
        return {}
    gap = metrics["reward/mean"] - metrics["curriculum/level"]
    return {"curriculum/level_gap": gap, "curriculum/level_gap_stds": gap / metrics["curriculum/level_std"]}
