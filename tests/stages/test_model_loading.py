"""Whatever keeps a model from loading is named by key, with the remedy: folders and a hub of our own."""

import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api

from adagrpo_train.errors import ConfigError
from tests.small_flux import flux_model
from tests.support import MID, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of tiny_sd3 whose files are links: replace them, never write into them."""
    return Path(shutil.copytree(MID, tmp_path / "model", copy_function=os.link))


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
DAMAGES = {
    "the folder vae is missing; download it again": lambda f: shutil.rmtree(f / "vae"),
    "model_index.json is missing": lambda f: (f / "model_index.json").unlink(),
    "model_index.json is damaged": lambda f: replace(f / "model_index.json", b'{"_class_name": "Sta'),
    f"no file named {WEIGHTS}": lambda f: (f / "transformer" / WEIGHTS).unlink(),
    "config.json": lambda f: (f / "transformer" / "config.json").unlink(),
    "is missing or damaged; download the folder again": lambda f: replace(f / "transformer" / WEIGHTS, b"12345678abc"),
    "git-lfs": lambda f: replace(f / "transformer" / WEIGHTS, POINTER),
    "model.safetensors": lambda f: (f / "text_encoder" / "model.safetensors").unlink(),
    "is missing or damaged": lambda f: replace(f / "text_encoder_2" / "model.safetensors", b"12345678abc"),
    "tokenizer knows 2 tokens, text_encoder has 131: a file of the folder tokenizer is missing": (
        lambda f: (f / "tokenizer" / "tokenizer.json").unlink()
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_an_incomplete_folder_is_named(folder: Path, message: str) -> None:
    DAMAGES[message](folder)
    with pytest.raises(ConfigError) as caught:
        tiny_model(path=str(folder))
    assert str(caught.value).startswith(f"model.path={folder}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True of its scheduler is not supported"),
        ({"shift_terminal": 0.02}, "shift_terminal=0.02 of its scheduler is not supported"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting of its scheduler is not supported for SD3"),
    ],
)
def test_a_grid_that_we_do_not_make_is_refused(folder: Path, setting: dict[str, object], message: str) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    replace(path, json.dumps(json.loads(path.read_text()) | setting).encode())
    with pytest.raises(ConfigError, match=message):
        tiny_model(path=str(folder))


def test_a_picture_larger_than_the_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.resolution=40: the model has positions for 32 pixels at most"):
        tiny_model(resolution=40)


def test_a_folder_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a StableDiffusion3Pipeline, this model is a FluxPipeline"):
        flux_model(folder)


def test_a_text_encoder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no text_encoder_3"):
        tiny_model(text_encoder_3=True, max_sequence_length=8)


@pytest.mark.parametrize(("text_encoder_3", "length"), [(True, 0), (False, -1), (True, 513)])
def test_a_text_length_out_of_range_is_refused(text_encoder_3: bool, length: int) -> None:
    with pytest.raises(ConfigError, match=f"model.max_sequence_length={length}"):
        tiny_model(text_encoder_3=text_encoder_3, max_sequence_length=length)


@pytest.mark.parametrize("path", ["models/sd3/medium", "nowhere"])
def test_a_path_that_is_neither_a_folder_nor_an_id_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="no such folder, and no id of a model on the hub, OWNER/NAME"):
        tiny_model(path=path)


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: metadata of a gated model is public, its files are not."""

    def do_GET(self) -> None:
        listing = self.path.startswith("/api/models/")
        if "gated" in self.path and listing:
            body = b'{"id": "someone/gated", "sha": "abc", "siblings": [{"rfilename": "model_index.json"}]}'
            self.reply(200, body, "")
        elif "gated" in self.path:
            self.reply(403, b"", "GatedRepo")
        elif "empty" in self.path and listing:
            self.reply(200, b'{"id": "someone/empty", "sha": "abc", "siblings": []}', "")
        elif "empty" in self.path:
            self.reply(404, b"", "EntryNotFound")
        else:
            self.reply(401, b"", "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the names that the server calls

    def reply(self, status: int, body: bytes, code: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("someone/gated", "gated: accept its licence at https://huggingface.co/someone/gated, then `hf auth login`"),
        ("someone/nothing", "no such model on the hub, or a private one"),
        ("someone/empty", "the hub's model lacks a file of a diffusers pipeline"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(hub: ThreadingHTTPServer, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_model(path=path)
    assert f"model.path={path}: {message}" in str(caught.value)


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_out_of_reach_is_explained(
    hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:1")  # nobody listens there
    with pytest.raises(ConfigError, match=r"model\.path=someone/fine: the hub cannot be reached; `hf download"):
        tiny_model(path="someone/fine")


def test_adapters_are_not_a_pipeline_and_the_way_to_evaluate_them_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=rf"model\.path={tmp_path}: holds adapters.*adagrpo-eval resume=RUN.*fuse_lora"
    ):
        tiny_model(path=str(tmp_path))
