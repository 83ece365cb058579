"""Records what the package hpsv2 1.2.0 computes with seeded random weights, for tests/vision.

The package wants an environment of its own: it pins protobuf below 4 and pytest 7. Its wheel lacks the vocabulary of
its tokenizer, which is open_clip's own (same bytes), and one of its files imports a name from `turtle`, which needs
tkinter; this script supplies both. From the root of the repository:

    python3.11 -m venv /tmp/hps && /tmp/hps/bin/pip install torch==2.13.0
    /tmp/hps/bin/pip install -c constraints.txt hpsv2==1.2.0 open-clip-torch==3.3.0
    /tmp/hps/bin/python -m scripts.goldens.hpsv2 --target tests/golden/rewards/hpsv2.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
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

from rewards.vision.torchvision_shim import import_open_clip
from scripts.goldens.hps_seeded import PROMPTS, SIZES, SMALL_CLIP, picture, seeded

SEED = 7
#: Every so many pixels one is recorded, in both directions.
STRIDE = 32
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def mend_package() -> None:
    """Make the package importable: a vocabulary, and a `turtle` where Python came without tkinter."""
    package, open_clip = find_spec("hpsv2"), import_open_clip()
    assert package is not None and package.origin is not None, "hpsv2 is not installed"
    place = Path(package.origin).parent / "src" / "open_clip" / VOCABULARY
    if not place.exists():
        shutil.copy(Path(open_clip.__path__[0]) / VOCABULARY, place)
    try:
        import_module("turtle")
    except ImportError:
        sys.modules["turtle"] = ModuleType("turtle")
        sys.modules["turtle"].forward = None  # type: ignore[attr-defined]


def record(architecture: str) -> dict[str, Any]:
    """Pixels and scores of every picture of `SIZES` with every prompt of `PROMPTS`."""
    img_score, open_clip = import_module("hpsv2.img_score"), import_module("hpsv2.src.open_clip")

    if architecture == "small":
        open_clip.factory._MODEL_CONFIGS["small"] = SMALL_CLIP
    model, _, preprocess = open_clip.create_model_and_transforms(
        architecture, light_augmentation=True, output_dict=True
    )
    state = {name: torch.from_numpy(value) for name, value in seeded(model.state_dict(), SEED).items()}
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    pictures = [Image.fromarray(picture(number, size)) for number, size in enumerate(SIZES)]
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save({"state_dict": state}, file.name)
        scores = [[float(img_score.score(p, prompt, cp=file.name)[0]) for prompt in PROMPTS] for p in pictures]
    pixels = [preprocess(p)[:, ::STRIDE, ::STRIDE].flatten().tolist() for p in pictures]
    return {"architecture": architecture, "seed": SEED, "stride": STRIDE, "scores": scores, "pixels": pixels}


def names_digest() -> dict[str, Any]:
    """How many weights the package's ViT-H-14 has, and a hash of their names and shapes."""
    open_clip = import_module("hpsv2.src.open_clip")
    with torch.device("meta"):
        model = open_clip.factory.CLIP(**open_clip.factory.get_model_config("ViT-H-14"))
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    return {"weights": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--architecture", default="small", help="small, or one the package knows, such as ViT-B-32")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    mend_package()
    source = "hpsv2 1.2.0 (PyPI), hpsv2/img_score.py score, src/open_clip/transform.py"
    libraries = {name: version(name) for name in ("torch", "torchvision", "pillow")}
    golden = {"source": source, "libraries": libraries, "vit_h_14": names_digest(), **record(options.architecture)}
    options.target.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
