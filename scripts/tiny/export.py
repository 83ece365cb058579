"""Assembles a checkpoint and the autoencoder as a stock half-precision pipeline folder."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from scripts.tiny import recipe
from scripts.tiny.families import FAMILIES

LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Writes the pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="sd3")
    parser.add_argument("--vae", type=Path, default=None, help="autoencoder folder (default: untrained)")
    parser.add_argument("--checkpoint", type=Path, default=None, help="weights from `pretrain` (default: untrained)")
    parser.add_argument("--target", type=Path, required=True, help="pipeline folder to write")
    args = parser.parse_args()
    recipe.setup(seed=0, threads=1)
    family = FAMILIES[args.family]
    model = family.FlowModel()
    if args.checkpoint is not None:
        model.load_state_dict(torch.load(args.checkpoint))
    vae = AutoencoderKL.from_pretrained(args.vae) if args.vae is not None else recipe.build_vae()
    pipeline = family.assemble(model, vae).to(torch.float16)
    pipeline.save_pretrained(args.target)
    for path in args.target.rglob("*.safetensors"):
        path.chmod(0o644)
    config_path = args.target / "vae" / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("_name_or_path", None)  # a path of the machine that trained it
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(path.stat().st_size for path in args.target.rglob("*") if path.is_file())
    LOGGER.info("%s: %.2f MB", args.target, size / 1e6)


if __name__ == "__main__":
    main()
