"""Records what the package image-reward 1.5 computes with seeded random weights, for tests/vision.

The package runs with old libraries only, and importing it as a whole asks for packages that scoring does not need. So
its files are imported one by one, with a stand-in for fairscale, which only matters in training. From the root:

    python3.11 -m venv /tmp/ir && /tmp/ir/bin/pip install torch==2.13.0
    /tmp/ir/bin/pip install -c constraints.txt torchvision numpy pillow transformers==4.33.3 timm==0.6.13
    /tmp/ir/bin/pip install --no-deps image-reward==1.5
    /tmp/ir/bin/python -m scripts.goldens.image_reward --target tests/golden/rewards/image_reward.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from rewards.vision.torchvision_shim import mend_torchvision
from scripts.goldens.hps_seeded import PROMPTS, SIZES, SMALL_BLIP, WORD_PIECES, picture, seeded

SEED = 11
STRIDE = 32


def import_package() -> tuple[Any, Any, Any]:
    """The package's modules ImageReward, blip_pretrain and vit, without running its ``__init__`` files."""
    spec = find_spec("ImageReward")
    assert spec is not None and spec.origin is not None, "image-reward is not installed"
    root = Path(spec.origin).parent
    for name in ("ImageReward", "ImageReward.models", "ImageReward.models.BLIP"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    wrapper = ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    wrapper.checkpoint_wrapper = None  # type: ignore[attr-defined]
    for depth in range(1, 5):
        name = ".".join(wrapper.__name__.split(".")[:depth])
        sys.modules[name] = wrapper if depth == 4 else ModuleType(name)
    blip = "ImageReward.models.BLIP"
    names = ("ImageReward.ImageReward", f"{blip}.blip_pretrain", f"{blip}.vit")
    module, pretrain, vit = map(import_module, names)
    return module, pretrain, vit


def build(folder: Path) -> Any:
    """The package's model, small, with seeded weights."""
    from transformers import BertTokenizer

    module, pretrain, vit = import_package()
    vision, text = SMALL_BLIP["vision"], SMALL_BLIP["text"]
    (folder / "vocab.txt").write_text("\n".join(WORD_PIECES) + "\n")
    (folder / "med.json").write_text(json.dumps(text | {"add_cross_attention": True, "layer_norm_eps": 1e-12}))
    tower = vit.VisionTransformer(
        img_size=224,
        patch_size=vision["patch_size"],
        embed_dim=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
    )
    pretrain.create_vit = lambda *_: (tower, vision["hidden_size"])
    pretrain.init_tokenizer = lambda: BertTokenizer(str(folder / "vocab.txt"))
    model = module.ImageReward(med_config=str(folder / "med.json"))
    model.mlp = module.MLP(text["hidden_size"])
    floats = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict({n: torch.from_numpy(v) for n, v in seeded(floats, SEED).items()}, strict=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    mend_torchvision()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = build(Path(folder))
        pictures = [Image.fromarray(picture(number, size)) for number, size in enumerate(SIZES)]
        golden = {
            "source": "image-reward 1.5 (PyPI), ImageReward/ImageReward.py score and _transform",
            "libraries": {name: version(name) for name in ("torch", "torchvision", "pillow", "transformers", "timm")},
            "seed": SEED,
            "stride": STRIDE,
            "weights": {n: list(v.shape) for n, v in model.state_dict().items() if v.is_floating_point()},
            "scores": [[model.score(prompt, p) for prompt in PROMPTS] for p in pictures],
            "pixels": [model.preprocess(p)[:, ::STRIDE, ::STRIDE].flatten().tolist() for p in pictures],
        }
    options.target.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
