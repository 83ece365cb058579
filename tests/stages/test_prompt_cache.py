"""Prompt embeddings on disk: what they equal, who shares them, what happens to a damaged one."""

import json
import logging
import weakref
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch

from adagrpo_train.errors import ConfigError, PromptError
from adagrpo_train.models.sd3 import SD3Model
from adagrpo_train.runtime import prompt_cache
from adagrpo_train.runtime.prompt_cache import PromptEncoder
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.types import Conditions
from tests.small_flux import flux_model, save_flux
from tests.support import PROMPTS, alone, make_trainer, tiny_model

TEXTS = list(PROMPTS.texts)


@pytest.fixture
def model() -> SD3Model:
    return tiny_model(guidance_scale=2.0)


def encoder(model: SD3Model, folder: Path) -> PromptEncoder:
    return PromptEncoder(model, folder=str(folder), engine=alone())


def same(one: Conditions, other: Conditions) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Conditions)]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_cached_embeddings_equal_fresh_ones_of_single_prompts_bit_for_bit(family: str, tmp_path: Path) -> None:
    """CLIP's and T5's; with guidance and without."""
    made = save_flux(tmp_path / "model", guidance=True) if family == "flux" else None
    model = flux_model(made) if made else tiny_model(guidance_scale=2.0)
    fresh = [model.encode([text]) for text in TEXTS]
    cache = PromptEncoder(model, folder=str(tmp_path), engine=alone())
    cache.prepare(TEXTS)
    assert all(same(cache.encode([text]), own) for text, own in zip(TEXTS, fresh, strict=True))
    rows = [2, 0, 2]  # another order, and one twice
    together = cache.encode([TEXTS[row] for row in rows])
    assert (together.negative_prompt_embeds is None) == (family == "flux")
    assert all(same(together[torch.tensor([place])], fresh[row]) for place, row in enumerate(rows))


def asked(model: SD3Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the model's encoders are asked for from now on."""
    texts: list[str] = []
    encode = model.encode

    def noted(wanted: list[str]) -> Conditions:
        texts.extend(wanted)
        return encode(wanted)

    monkeypatch.setattr(model, "encode", noted)
    return texts


def test_what_is_there_is_not_encoded_again(model: SD3Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder(model, tmp_path).prepare(TEXTS[:2])
    before, again = files(tmp_path), tiny_model(guidance_scale=2.0)
    made, texts = encoder(again, tmp_path), asked(again, monkeypatch)
    made.prepare(TEXTS)
    assert set(TEXTS) & set(texts) == {TEXTS[2]}
    assert before.items() <= files(tmp_path).items()


def test_the_text_encoders_leave_the_memory_and_still_come_with_an_export(model: SD3Model, tmp_path: Path) -> None:
    encoders = [weakref.ref(part) for part in model.text_encoders()]
    assert len(encoders) == 2
    encoder(model, tmp_path / "cache").prepare(TEXTS)
    assert [part() for part in encoders] == [None, None]
    model.export_full(tmp_path / "export")
    exported = tiny_model(path=str(tmp_path / "export"), guidance_scale=2.0)
    assert same(exported.encode(TEXTS), tiny_model(guidance_scale=2.0).encode(TEXTS))
    assert list(model.text_encoders()) == []  # and gone again


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda content: b""], ids=["cut", "one bit", "empty"])
def test_a_damaged_file_is_encoded_again_with_a_warning(
    damage: Any, model: SD3Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = model.encode(TEXTS[:1])
    cache = encoder(model, tmp_path)
    cache.prepare(TEXTS[:1])
    path = cache._path(TEXTS[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PromptError, match="text encoders are no longer in memory; its prompt is 'a red circle'"):
        cache.encode(TEXTS[:1])
    again = encoder(tiny_model(guidance_scale=2.0), tmp_path)
    with caplog.at_level(logging.WARNING):
        again.prepare(TEXTS[:1])
    assert path.name in caplog.text
    assert same(again.encode(TEXTS[:1]), fresh)


def test_a_prompt_that_nobody_prepared_is_named(model: SD3Model, tmp_path: Path) -> None:
    cache = encoder(model, tmp_path)
    cache.prepare(TEXTS[:1])
    with pytest.raises(PromptError, match="its prompt is 'two blue squares'"):
        cache.encode(TEXTS[:2])


@pytest.mark.parametrize("change", ["weights", "tokenizer", "dtype", "guidance", "length"])
def test_other_encoders_have_another_sub_folder(change: str, model: SD3Model, tmp_path: Path) -> None:
    other = tiny_model(
        guidance_scale=1.0 if change == "guidance" else 2.0,
        dtype="bfloat16" if change == "dtype" else "float32",
        max_sequence_length=8 if change == "length" else 0,
    )
    if change == "weights":
        other.pipeline.text_encoder.text_model.final_layer_norm.weight.data[0] += 1e-3
    elif change == "tokenizer":
        other.pipeline.tokenizer_2.add_tokens(["circle"])
    assert encoder(model, tmp_path)._folder == encoder(tiny_model(guidance_scale=2.0), tmp_path)._folder
    assert encoder(model, tmp_path)._folder != encoder(other, tmp_path)._folder


def test_a_disk_that_is_too_small_is_refused_before_encoding(
    model: SD3Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = encoder(model, tmp_path)
    monkeypatch.setattr(prompt_cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match=r"the 4 prompts that it lacks take 0\.\d GB"):
        cache.prepare(TEXTS)


def test_a_run_encodes_what_it_will_draw_and_the_held_out_prompts(tmp_path: Path) -> None:
    settings = [f"prompt_cache={tmp_path / 'cache'}", "iterations=2", "group_size=2", "evaluation.images=3"]
    trainer, parts, _ = make_trainer(*settings, "evaluation.grid_images=1", run_dir=tmp_path / "run")
    source = trainer._prompts
    expected = {*parts.evaluator.texts, *source.next(2).texts, *source.next(2).texts, ""}
    (folder,) = (tmp_path / "cache").iterdir()
    assert {parts.encoder._path(text).name for text in expected} == files(folder).keys()
    assert list(json.loads((folder / "identity.json").read_text())["components"]) == [
        "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"
    ]  # fmt: skip


def _rank(rank: int, port: int, folder: Path, results: Any) -> None:
    import os

    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # as launchers set them
    model = tiny_model()
    written: list[str] = []
    made = PromptEncoder(
        model, folder=str(folder), engine=ReplicatedEngine(kind="ddp", device="cpu", timeout_seconds=60)
    )
    write = made._write
    made._write = lambda text, tensors: (written.append(text), write(text, tensors))[1]  # type: ignore[method-assign]
    made.prepare(TEXTS)
    results.put((rank, written, made.encode(TEXTS).prompt_embeds.tolist()))


@pytest.mark.slow
def test_processes_share_the_work_and_the_folder(tmp_path: Path) -> None:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, tmp_path, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    (_, first, one), (_, second, other) = sorted(results.get(timeout=240) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert sorted([*first, *second]) == sorted([*TEXTS, ""])  # each once
    assert min(len(first), len(second)) == 2
    assert one == other
