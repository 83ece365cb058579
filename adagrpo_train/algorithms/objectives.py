"""What the policy update minimises."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import losses
from adagrpo_train.functional import transitions as f
from adagrpo_train.interfaces import Policy, Transition
from adagrpo_train.runtime.transfer import to_device
from adagrpo_train.types import Conditions, Gaussian, Loss, Terms, Transitions


@dataclass(frozen=True, kw_only=True)
class ClippedRatio:
    """GRPO on transitions: the clipped surrogate plus kl_weight times the KL to the frozen reference.

    Args:
        transition: the stochastic step that the rollout took.
        clip_range: half-width of the ratio's trust region. Published ranges fit log-probabilities averaged over
            latent dims; Flow-CPS's lack 1 / (2 std^2), so its range is on another scale.
        kl_weight: 0 switches the reference forward off.
        kl: "closed_form" is the KL of the two Gaussians; "flow_grpo" leaves sqrt(sigma - sigma_next) out of the
            standard deviation as the published code does, so it is (sigma - sigma_next) times the former;
            "unscaled" is the squared distance of the means, as in the Flow-CPS code.
    """

    transition: Transition
    clip_range: float
    kl_weight: float
    kl: Literal["closed_form", "flow_grpo", "unscaled"]

    def __post_init__(self) -> None:
        if not self.clip_range > 0:
            raise ConfigError(f"algorithm.objective.clip_range={self.clip_range}: must be > 0")
        if self.kl_weight < 0:
            raise ConfigError(f"algorithm.objective.kl_weight={self.kl_weight}: must be >= 0")
        if self.kl not in ("closed_form", "flow_grpo", "unscaled"):
            raise ConfigError(f"algorithm.objective.kl={self.kl}: choose closed_form, flow_grpo or unscaled")

    def loss(
        self, policy: Policy, batch: Transitions, conditions: Conditions, advantages: Tensor, sigma_max: float
    ) -> Loss:
        """Mean loss over the transitions of one network batch; states without a transition count nowhere.

        Args:
            batch: without a log_prob its policy is the present one: the ratio is 1 and carries the gradient alone.
            conditions: R rows, those of batch.x.
            advantages: [M] of the samples the transitions earned.
        """
        return self.surrogate(self._terms(policy, batch, conditions, sigma_max), advantages)

    def surrogate(self, terms: Terms, advantages: Tensor) -> Loss:
        """The same from what the network says, which it does not need any more.

        Args:
            terms: of M transitions; with the KL if it has a weight.
            advantages: [M].
        """
        log_ratio = terms.log_prob - terms.old_log_prob
        value = losses.clipped_policy_loss(log_ratio, advantages, clip_range=self.clip_range).mean()
        ratio = log_ratio.detach().exp()
        metrics = {
            "policy/ratio_mean": ratio.mean(),
            "policy/ratio_deviation": (ratio - 1).abs().mean(),
            "policy/ratio_max_deviation_max": (ratio - 1).abs().max(),
            "policy/clip_fraction": losses.clip_fraction(log_ratio.detach(), self.clip_range),
            "policy/approx_kl": losses.approx_kl(log_ratio.detach()),
        }
        if self.kl_weight > 0:
            assert terms.kl is not None
            kl = terms.kl.mean()
            value, metrics["policy/kl"] = value + self.kl_weight * kl, kl.detach()
        deviation = (terms.log_prob.detach() - terms.rollout_log_prob).abs().max()
        return Loss(value, deviation, {"policy/loss": value.detach(), **metrics}, terms.detach())

    def log_prob(self, policy: Policy, batch: Transitions, conditions: Conditions, sigma_max: float) -> Tensor:
        """Log-probabilities [M] float32 of the transitions under the present policy.

        Computed with gradients, as loss() does, even where nothing follows from them: a compiled network has another
        program without, whose last bits differ.
        """
        step = self._step(policy.velocity(batch.x, batch.sigma, conditions), batch, sigma_max)
        return self.transition.log_prob(batch.x_next, _rows(step, batch.state)).detach()

    def _terms(self, policy: Policy, batch: Transitions, conditions: Conditions, sigma_max: float) -> Terms:
        step = self._step(policy.velocity(batch.x, batch.sigma, conditions), batch, sigma_max)
        log_prob, kl = self.transition.log_prob(batch.x_next, _rows(step, batch.state)), None
        if self.kl_weight > 0:
            reference = self._step(policy.reference_velocity(batch.x, batch.sigma, conditions), batch, sigma_max)
            kl = self._kl(step, reference.mean, batch)[to_device(batch.state, step.mean.device)]
        old = log_prob.detach() if batch.log_prob is None else batch.log_prob
        return Terms(log_prob, old, batch.rollout_log_prob, kl)

    def _step(self, velocity: Tensor, batch: Transitions, sigma_max: float) -> Gaussian:
        return self.transition.step(batch.x, velocity, batch.sigma, batch.sigma_next, sigma_max)

    def _kl(self, step: Gaussian, reference_mean: Tensor, batch: Transitions) -> Tensor:
        if self.kl == "closed_form":
            return f.gaussian_kl(step, reference_mean)
        if self.kl == "unscaled":
            return f.cps_kl(step, reference_mean)
        diffusion = step.std.flatten() / (batch.sigma - batch.sigma_next).sqrt()
        return f.flow_grpo_kl(step, reference_mean, diffusion)


def _rows(step: Gaussian, state: Tensor) -> Gaussian:
    at = to_device(state, step.mean.device)
    return Gaussian(step.mean[at], step.std[at])
