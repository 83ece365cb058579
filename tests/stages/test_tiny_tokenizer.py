"""The CLIP tokenizers of the bundled models: one fixed id per word, the padding that pretraining used."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from rewards.shapes.grammar import WORDS, caption, enumerate_scenes

ASSETS = Path(__file__).parents[2] / "adagrpo_train" / "assets"
START, END, LENGTH = 0, 1, 13
CASES = [(f"tiny_sd3/{variant}", name) for variant in ("mid", "full") for name in ("tokenizer", "tokenizer_2")]
CASES.append(("tiny_flux/mid", "tokenizer"))


@pytest.mark.parametrize(("model", "name"), CASES)
def test_every_caption_gives_one_id_per_word(model: str, name: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / model / name)
    captions = [caption(scene) for scene in enumerate_scenes()]
    ids = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    assert tokenizer.model_max_length == LENGTH
    for text, row in zip(captions, ids, strict=True):
        words = [WORDS.index(word) + 2 for word in text.split()]
        expected = [START, *words, END]
        assert row == expected + [END] * (LENGTH - len(expected)), text


@pytest.mark.parametrize(("model", "name"), CASES)
def test_special_tokens(model: str, name: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / model / name)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (START, END, END)
    assert tokenizer("", padding="max_length").input_ids == [START] + [END] * (LENGTH - 1)
    assert tokenizer("A Red  CIRCLE").input_ids == tokenizer("a red circle").input_ids
