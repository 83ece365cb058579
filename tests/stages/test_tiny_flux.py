"""The bundled `tiny_flux` model: stock diffusers loads it from its files alone, and it follows captions."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline
from transformers import T5TokenizerFast

from rewards.shapes.grammar import CLASSES, WORDS, caption, difficulty_class, enumerate_scenes, split
from rewards.shapes.verifier import score
from tests.support import ASSETS

MID = ASSETS / "tiny_flux" / "mid"
PAD, END, UNKNOWN, LENGTH = 0, 1, 2, 12
PER_CLASS = 4


def test_t5_reads_one_id_per_word_and_pads_to_the_longest_caption() -> None:
    tokenizer = T5TokenizerFast.from_pretrained(MID / "tokenizer_2")
    captions = [caption(scene) for scene in enumerate_scenes()[::8]]
    rows = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert tokenizer.model_max_length == LENGTH
    for text, row in zip(captions, rows, strict=True):
        expected = [*(WORDS.index(word) + 3 for word in text.split()), END]
        assert row == expected + [PAD] * (LENGTH - len(expected)), text
    assert tokenizer("a weird circle").input_ids == [3, UNKNOWN, WORDS.index("circle") + 3, END]


def test_the_stock_pipeline_draws_what_held_out_captions_ask_for() -> None:
    pipeline = FluxPipeline.from_pretrained(MID, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    by_class = {name: [s for s in split().heldout if difficulty_class(s) == name] for name in CLASSES}
    captions = [caption(members[7 * i % len(members)]) for members in by_class.values() for i in range(PER_CLASS)]
    arguments = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": LENGTH}
    generator = torch.Generator().manual_seed(0)
    images = pipeline(captions, **arguments, generator=generator, output_type="np").images
    pictures = (images * 255).round().astype(np.uint8)
    others = captions[PER_CLASS:] + captions[:PER_CLASS]  # what chance gives: the captions of the next class
    right = np.mean([score(picture, text).strict for picture, text in zip(pictures, captions, strict=True)])
    chance = np.mean([score(picture, text).strict for picture, text in zip(pictures, others, strict=True)])
    assert right >= 0.4 and chance <= 0.1, (right, chance)
