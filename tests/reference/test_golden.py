"""Our formulas reproduce the numbers of the official codes.

Each adapter reads a case's inputs and returns what our formulas make of them, in the layout of its outputs.
A case that no adapter recognises fails.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import adapters_advantages as advantages
import adapters_branches as branches
import adapters_optimisation as optimisation
import adapters_schedules as schedules
import adapters_steps as steps
import pytest
from golden_cases import GoldenCase, assert_matches


class Kind(NamedTuple):
    """Cases of one file whose source matches a pattern, and what to do with them."""

    file: str
    source: str
    adapter: Callable[[GoldenCase], dict[str, Any]] | None  # None: waits for the feature named below
    waits_for: str = ""


KINDS = (
    Kind("schedules.json", r"FlowMatchEulerDiscreteScheduler\(shift=", schedules.sd3),
    Kind("schedules.json", r"FlowMatchEulerDiscreteScheduler\(use_dynamic_shifting\)", schedules.flux),
    Kind("schedules.json", r"sd3_time_shift", schedules.time_shift),
    Kind("flow_grpo_step.json", r"sde_step_with_logprob", steps.flow_grpo),
    Kind("flow_cps_step.json", r"FlowCPS@.* sde_step_with_logprob", steps.flow_cps),
    Kind("dance_grpo_step.json", r"DanceGRPO@.* flux_step", steps.dance_grpo),
    Kind("grpo_series_flowsde.json", r"flowsde_std, flowsde_prob_func", steps.grpo_series),
    Kind("mixgrpo.json", r"Tencent-Hunyuan/MixGRPO@", None, "MixGRPO"),
    Kind("singular_sampling.json", r"sample_anchor \+ sample_group", branches.singular_sampling),
    Kind("adagrpo_loss.json", r"method_adagrpo\.py compute_loss", branches.adagrpo_loss),
    Kind("adagrpo_loss.json", r"method_pavegrpo\.py", None, "Pave-GRPO"),
    Kind("adagrpo_advantages.json", r"compute_relative_adv \+ compute_ema_adv", advantages.adagrpo),
    Kind("adagrpo_ema_selection.json", r"sample_evaluate_and_select_ema", advantages.level_and_selection),
    Kind("advantages.json", r"PerPromptStatTracker", advantages.flow_grpo_tracker),
    Kind("advantages.json", r"flow_grpo@.*per_prompt_stat_tracking off", advantages.flow_grpo_batch),
    Kind("advantages.json", r"calculate_zero_std_ratio", advantages.zero_std_metric),
    Kind("advantages.json", r"XueZeyue/DanceGRPO@", advantages.dance_grpo),
    Kind("advantages.json", r"Tencent-Hunyuan/MixGRPO@", None, "MixGRPO"),
    Kind("clipped_loss.json", r"GRPO_Guard", None, "GRPO-Guard"),
    Kind("clipped_loss.json", r"yifan123/flow_grpo@.* scripts/train_sd3\.py", optimisation.flow_grpo_loss),
    Kind("clipped_loss.json", r"FlowCPS@.* scripts/train_sd3\.py", optimisation.flow_cps_loss),
    Kind("clipped_loss.json", r"XueZeyue/DanceGRPO@", optimisation.dance_grpo_loss),
    Kind("samplers_ema.json", r"DistributedKRepeatSampler", None, "K-repeat index order"),
    Kind("samplers_ema.json", r"EMAModuleWrapper", optimisation.weight_average),
    Kind("samplers_ema.json", r"get_warmup_constant_anneal_scheduler", optimisation.learning_rate),
)


def test_our_formulas_reproduce_the_recorded_numbers(golden_case: GoldenCase):
    kind = _kind_of(golden_case)
    if golden_case.informational:
        pytest.skip(f"informational: {golden_case.notes}")
    if kind.adapter is None:
        pytest.skip(f"waits for {kind.waits_for}")
    assert_matches(kind.adapter(golden_case), golden_case.outputs, golden_case)


def _kind_of(case: GoldenCase) -> Kind:
    for kind in KINDS:
        if kind.file == case.file and re.search(kind.source, case.source):
            return kind
    pytest.fail(f"no adapter recognises {case.file} from {case.source!r}")
