"""A model config sets what its source says where nobody says otherwise, and each value has its source beside it."""

import re
from typing import Any

import pytest

from adagrpo_train.settings import config_dir, read_settings

# Flow-GRPO, yifan123/flow_grpo@ac4c86e config/grpo.py general_ocr_sd3, scripts/train_sd3.py max_sequence_length=128.
FLOW_GRPO_SD3 = {"resolution": 512, "num_steps": 10, "schedule": "sd3", "guidance_gradient": True}
FLOW_GRPO_SD3 |= {"text_encoder_3": True, "max_sequence_length": 128, "dtype": "bfloat16"}
DEFAULTS: dict[str, dict[str, Any]] = {
    # The guidance scales of SD3 medium, SD3.5 large and FLUX.1-schnell are those of their model cards.
    "sd3_medium": FLOW_GRPO_SD3 | {"path": "stabilityai/stable-diffusion-3-medium-diffusers", "guidance_scale": 7.0},
    "sd35_medium": FLOW_GRPO_SD3 | {"path": "stabilityai/stable-diffusion-3.5-medium", "guidance_scale": 4.5},
    "sd35_large": FLOW_GRPO_SD3 | {"path": "stabilityai/stable-diffusion-3.5-large", "guidance_scale": 3.5},
    # Flow-GRPO of September 2025, config/grpo.py pickscore_flux; text as long as the stock pipeline's.
    "flux_dev": {"path": "black-forest-labs/FLUX.1-dev", "resolution": 512, "num_steps": 6, "schedule": "flux"}
    | {"guidance_scale": 3.5, "max_sequence_length": 512, "dtype": "bfloat16"},
    "flux_schnell": {"path": "black-forest-labs/FLUX.1-schnell", "resolution": 512, "num_steps": 4, "schedule": "flux"}
    | {"guidance_scale": 0.0, "max_sequence_length": 256, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_model_has_the_published_defaults(name: str) -> None:
    values = read_settings([f"model={name}"]).values["model"]
    assert {key: value for key, value in values.items() if key not in ("_target_", "decode_batch")} == DEFAULTS[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_number_of_a_model_has_its_source_beside_it(name: str) -> None:
    lines = (config_dir() / "model" / f"{name}.yaml").read_text().splitlines()
    numbers = [line for line in lines if re.match(r"\w+: [\d.]+\b", line) and not line.startswith("decode_batch")]
    assert len(numbers) == 4
    assert all(" # " in line for line in numbers)
