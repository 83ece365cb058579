"""Policy losses and their diagnostics, as pure functions of log-ratios and advantages."""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_policy_loss(
    log_ratio: Float[Tensor, " items"], advantages: Float[Tensor, " items"], *, clip_range: float
) -> Float[Tensor, " items"]:
    """max(-A r, -A clamp(r, 1 - clip_range, 1 + clip_range)) per item [items], to be minimised.

    At r = 1 its gradient with respect to log_ratio is -A. The maximum stops an item only once its ratio has
    left the range in the direction its advantage asks for.

    Args:
        log_ratio: [items] log-probability now minus log-probability when sampled.
        advantages: [items] unitless, without gradient.
        clip_range: half-width of the ratio's free range, unitless, >= 0; inf switches clipping off. Log-probabilities
            are means over thousands of latent elements, which is why published values are near 1e-4.

    Raises:
        ValueError: clip_range is negative.

    Source: PPO, arXiv:1707.06347, eq. 7; yifan123/flow_grpo@ac4c86e, XueZeyue/DanceGRPO@15cc71d.
    """
    _require_clip_range(clip_range)
    ratio = torch.exp(_widened(log_ratio))
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def clip_fraction(log_ratio: Float[Tensor, " items"], clip_range: float) -> Float[Tensor, ""]:
    """Share of items whose ratio has left [1 - clip_range, 1 + clip_range] [], in [0, 1].

    Args:
        log_ratio: [items] log-probability now minus log-probability when sampled.
        clip_range: unitless, >= 0; inf gives 0.

    Raises:
        ValueError: clip_range is negative.

    Source: yifan123/flow_grpo@ac4c86e, scripts/train_sd3.py.
    """
    _require_clip_range(clip_range)
    return ((torch.exp(_widened(log_ratio)) - 1).abs() > clip_range).float().mean()


def approx_kl(log_ratio: Float[Tensor, " items"]) -> Float[Tensor, ""]:
    """mean(log_ratio^2) / 2 []: second-order estimate of the KL divergence from the sampling policy, in nats.

    Args:
        log_ratio: [items] log-probability now minus log-probability when sampled.

    Source: yifan123/flow_grpo@ac4c86e, scripts/train_sd3.py; http://joschu.net/blog/kl-approx.html.
    """
    return 0.5 * (_widened(log_ratio) ** 2).mean()


def _widened(log_ratio: Tensor) -> Tensor:
    return log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))


def _require_clip_range(clip_range: float) -> None:
    if not clip_range >= 0:
        raise ValueError(f"clip_range must be >= 0, got {clip_range}; inf switches clipping off")
