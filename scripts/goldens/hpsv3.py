"""Records what the package hpsv3 1.0.0 computes with seeded random weights, for tests/scoring/test_hpsv3.py.

The package wants transformers 4.45.2 and, for training, a dozen libraries that scoring does without: they are replaced
by empty modules here. From the root of the repository:

    python3.11 -m venv /tmp/hps3 && /tmp/hps3/bin/pip install torch==2.13.0
    /tmp/hps3/bin/pip install -c constraints.txt transformers==4.45.2 accelerate omegaconf pillow requests safetensors
    /tmp/hps3/bin/pip install --no-deps hpsv3==1.0.0
    /tmp/hps3/bin/python -m scripts.goldens.hpsv3 --target tests/golden/rewards

Writes hpsv3.json, and hpsv3_tokenizer.json: a byte-level tokenizer like Qwen2's, with a vocabulary of 1000.

Outputs in float32 and bfloat16 depend on the CPU: those of two kinds of CPU were 3e-5 and 0.03 apart, and those in
float32 are 2e-5 to 5e-5 from float64. In float64 only what the package itself keeps in float32, norms and rotary
tables, is left to differ: by 2e-6 between AVX-512 and no vector instructions at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.goldens.hps_seeded import picture, seeded

SEED = 11
VOCABULARY = 1000  # before the reward token
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
#: Enlarged, shrunk, rounded up beyond 256 tokens, taken as it is, and long.
SIZES = ((97, 33), (512, 512), (300, 431), (448, 448), (768, 512), (30, 500))
PROMPTS = (
    "a photo of a cat",
    "",
    "{braces} and {text_prompt}",
    "Ein Bär, 4k &amp; <b>HDR</b>!",
    "\u72ac",
    "long " * 40,
)
#: Every so many patches, and values of a patch, one is recorded.
STRIDES = (31, 89)
GAINS = {"self_attn.q_proj.weight": 3.0, "self_attn.k_proj.weight": 3.0, "rm_head.": 2.0}
#: Heads as wide as in the 7B model, whose rotary frequencies suffer from rounding as there. Words of transformers 4.45.
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 2,
        "embed_dim": 80,
        "hidden_size": 256,
        "num_heads": 1,
        "mlp_ratio": 2,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
#: Of Qwen2-VL-7B-Instruct, recalled; only the names and shapes of its weights are compared.
SEVEN_B: dict[str, Any] = {
    "vocab_size": 151658,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
}
#: What the template of Qwen2-VL-7B-Instruct says of one user who shows pictures and speaks.
CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TRAINING_ONLY = ("datasets", "fire", "matplotlib", "matplotlib.patches", "matplotlib.pyplot", "pandas", "peft",
                  "torch.utils.tensorboard", "torchvision", "torchvision.transforms",
                  "torchvision.transforms.functional", "trl")  # fmt: skip


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Placeholder(metaclass=_Anything):
    """A class that a module of the package may name, subclass or look into at import."""


class _EmptyModule(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # so that it may have submodules
        self.__spec__ = ModuleSpec(name, None)  # torch looks for some of them, too

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder


def mend_package() -> None:
    """Make the package importable without what only training needs."""
    # First, with all that they look for: transformers asks for some of these modules, and must not find empty ones.
    for name in ("transformers.trainer", "transformers.models.qwen2_vl.processing_qwen2_vl"):
        import_module(name)
    for name in _TRAINING_ONLY:
        sys.modules[name] = _EmptyModule(name)


def make_tokenizer(path: Path, texts: list[str]) -> None:
    """Train a byte-level tokenizer on some texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = (  # as Qwen2's tokenizer cuts them
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fillers = VOCABULARY - len(SPECIAL) - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"\u00a7{number}" for number in range(fillers)])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path), pretty=False)


def write_base(folder: Path, tokenizer: Path, config: dict[str, Any]) -> None:
    """A folder with a tokenizer and a config, as Qwen2-VL-7B-Instruct has them on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    names = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"additional_special_tokens": list(SPECIAL)}))
    (folder / "config.json").write_text(json.dumps(config))


def tiny_config(ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the tiny model, in the layout of transformers 4.45, which the hub's file has."""
    tokens = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vocab_size": VOCABULARY,
    }
    return {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", **TINY, **tokens}


def tiny_weights(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights of every name, float32, from names and shapes alone.

    Attention and head are strong enough for positions, and their rounding, to show in the outputs.
    """
    weights = seeded({name: np.empty(shape, np.float32) for name, shape in shapes.items()}, SEED)
    return {
        name: value * np.float32(next((g for k, g in GAINS.items() if k in name), 1)) for name, value in weights.items()
    }


def fill(model: Any) -> None:
    """Load the tiny weights into a model of the package, rounded to its precision."""
    state = model.state_dict()
    model.load_state_dict(
        {n: torch.from_numpy(v) for n, v in tiny_weights({n: v.shape for n, v in state.items()}).items()}
    )


def published_class(config: Any, reward_id: int) -> Any:
    trainer = import_module("hpsv3.model.qwen2vl_trainer")
    return trainer.Qwen2VLRewardModelBT(
        config, output_dim=2, reward_token="special", special_token_ids=[reward_id], rm_head_type="ranknet"
    )


def record(tokenizer_file: Path, folder: Path) -> dict[str, Any]:
    """Token ids, pixels and outputs of every picture of `SIZES` with the prompt at its place in `PROMPTS`."""
    transformers = import_module("transformers")
    inference = import_module("hpsv3.inference")

    raw = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    config = tiny_config({token: raw.convert_tokens_to_ids(token) for token in SPECIAL})
    write_base(folder, tokenizer_file, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    reward_id = tokenizer.convert_tokens_to_ids("<|Reward|>")
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE
    )
    model = published_class(transformers.Qwen2VLConfig.from_pretrained(folder), reward_id)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    fill(model)
    # What autocast does on a GPU, where the package runs it.
    model.rm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module[0].weight.dtype),))

    judge = object.__new__(inference.HPSv3RewardInferencer)
    judge.model, judge.processor, judge.device, judge.use_special_tokens = model.eval(), processor, "cpu", True
    pictures = [Image.fromarray(picture(number, size)) for number, size in enumerate(SIZES)]
    batch = judge.prepare_batch(pictures, list(PROMPTS))
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    patches, alone = batch["pixel_values"], []
    for image, prompt in zip(pictures, PROMPTS, strict=True):
        alone += judge.reward([image], [prompt]).tolist()
    outputs = {"float32": judge.reward(pictures, list(PROMPTS)).tolist(), "float32_alone": alone}
    model.to(torch.float64)  # weights and frequencies keep their float32 values
    outputs["float64"] = judge.reward(pictures, list(PROMPTS)).tolist()
    model.to(torch.bfloat16)  # as create_model_and_processor does, before it loads the checkpoint
    model.rm_head.to(torch.float32)
    fill(model)
    outputs["bfloat16"] = judge.reward(pictures, list(PROMPTS)).tolist()
    model.to(torch.float32)  # the rotary frequencies stay rounded
    fill(model)
    outputs["float32_rounded_rotary"] = judge.reward(pictures, list(PROMPTS)).tolist()
    model.to(torch.float64)
    outputs["float64_rounded_rotary"] = judge.reward(pictures, list(PROMPTS)).tolist()
    return {
        "seed": SEED,
        "shapes": shapes,
        "config": config,
        "ids": {"lengths": [len(row) for row in ids], "sha256": hashlib.sha256(str(ids).encode()).hexdigest()},
        "grids": batch["image_grid_thw"].tolist(),
        "pixels": patches[:: STRIDES[0], :: STRIDES[1]].flatten().tolist(),
        "pixels_sha256": hashlib.sha256(patches.numpy().astype(np.float32).tobytes()).hexdigest(),
        "outputs": outputs,
    }


def seven_b_names() -> dict[str, Any]:
    """How many weights the 7B model has in the package, and a hash of their names and shapes."""
    with torch.device("meta"):
        model = published_class(import_module("transformers").Qwen2VLConfig(**SEVEN_B), 151657)
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    return {"weights": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="folder to write to")
    parser.add_argument("--base", type=Path, default=Path("/tmp/hpsv3_tiny"), help="folder for the tiny base model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    mend_package()
    texts = import_module("hpsv3.dataset.data_collator_qwen")
    tokenizer_file = options.target / "hpsv3_tokenizer.json"
    make_tokenizer(tokenizer_file, [texts.INSTRUCTION, texts.prompt_with_special_token, *PROMPTS])
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy")}
    golden = {
        "source": "hpsv3 1.0.0 (PyPI), hpsv3/inference.py HPSv3RewardInferencer.reward",
        "libraries": libraries,
        "seven_b": seven_b_names(),
        **record(tokenizer_file, options.base),
    }
    (options.target / "hpsv3.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
