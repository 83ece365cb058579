"""What a log says about the scores of an iteration."""

from collections.abc import Mapping

from torch import Tensor

from adagrpo_train.functional.advantages import mean_group_std, misjudged, zero_variance_fraction
from adagrpo_train.types import Level


def sample_figures(
    rewards: Tensor,
    parts: Mapping[str, Tensor],
    group: Tensor,
    usable: Tensor,
    local: Tensor,
    fused: Tensor,
    level: Level | None,
) -> dict[str, float]:
    """Figures over the usable samples of all ranks: one that may not be trained on counts in none of them.

    Args:
        rewards: [N], NaN where missing.
        parts: name -> [N], NaN where missing; a part that no usable sample has gets no figure.
        group: [N] group of each sample.
        usable: [N] bool, at least one true.
        local: [N] advantages against the group alone.
        fused: [N] advantages as they enter the loss.
        level: what the rewards are compared with beyond their group; None before anything was scored.
    """
    present, by_group = rewards[usable], group[usable]
    alone, both = local[usable], fused[usable]
    figures = {
        "reward/mean": float(present.mean()),
        "reward/std": float(present.std()),
        "reward/group_std_mean": float(mean_group_std(present, by_group)),
        "reward/zero_variance_fraction": float(zero_variance_fraction(present, by_group)),
        "reward/unused_fraction": float((~usable).float().mean()),
        "advantage/mean": float(both.mean()),
        "advantage/abs_mean": float(both.abs().mean()),
        "advantage/sign_flip_fraction": float((both * alone < 0).float().mean()),
    }
    if level is not None:
        figures |= {"curriculum/level": level.mean, "curriculum/level_std": level.std}
        for name, judged in (("local", alone), ("fused", both)):
            rates = zip(("false_positive", "false_negative"), misjudged(judged, present, level.mean), strict=True)
            figures |= {f"advantage/{name}_{kind}_rate": rate for kind, rate in rates if rate is not None}
    for name, values in parts.items():
        own = values[usable & values.isfinite()]
        if len(own):
            figures[f"reward/{name}/mean"] = float(own.mean())
    return figures
