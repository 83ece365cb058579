"""Small models with seeded weights, written as the published ones are, and what to score with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.contract import Sample
from rewards.vision.torchvision_shim import import_open_clip
from scripts.goldens.hps_seeded import SMALL_CLIP, picture, seeded

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "rewards"


def write_small_clip(folder: Path, seed: int, config: dict[str, Any] | None = None) -> tuple[str, Path]:
    """Path of a model config, and a checkpoint for it in the form of HPS-v2's; open_clip loads their folder too."""
    model_config = config or SMALL_CLIP
    (folder / "config.json").write_text(json.dumps(model_config))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": {}}))
    model = import_open_clip().CLIP(**model_config)
    state = {name: torch.from_numpy(value) for name, value in seeded(model.state_dict(), seed).items()}
    torch.save({"state_dict": state}, folder / "open_clip_pytorch_model.bin")
    return str(folder / "config.json"), folder / "open_clip_pytorch_model.bin"


def put_seeded(model: torch.nn.Module, seed: int) -> None:
    """Fill a model with seeded weights."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict({n: torch.from_numpy(v) for n, v in seeded(state, seed).items()}, strict=False)


def samples(prompts: list[str], size: tuple[int, int] = (40, 56)) -> list[Sample]:
    """One picture each."""
    return [Sample(str(n), prompt, picture(n, size)) for n, prompt in enumerate(prompts)]


def values(scores: Any) -> np.ndarray:
    """The only metric of every score."""
    return np.array([value for score in scores for value in score.values()])
