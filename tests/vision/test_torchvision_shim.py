"""What the shim mends, and what it must not hide. In processes of their own: an import happens once."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from small_models import ROOT

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed here")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return result.stdout + result.stderr


@pytest.mark.slow
@needs_torchvision
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is not a CPU-only build here")
def test_a_cpu_only_torch_needs_it() -> None:
    assert "torchvision::nms does not exist" in run("import torchvision")


@pytest.mark.slow
@needs_torchvision
def test_torchvision_and_transformers_import_after_it() -> None:
    code = (
        "import gc; from rewards.vision.torchvision_shim import mend_torchvision as m; m(); m(); gc.collect();"
        "from torchvision.transforms import Resize; from transformers import CLIPModel; print('fine')"
    )
    assert run(code).strip().endswith("fine")


@pytest.mark.slow
@needs_torchvision
def test_another_fault_of_torchvision_is_not_hidden(tmp_path: object) -> None:
    code = (
        f"import os, sys; os.makedirs({str(tmp_path)!r} + '/torchvision'); sys.path.insert(0, {str(tmp_path)!r});"
        f"open({str(tmp_path)!r} + '/torchvision/__init__.py', 'w').write('raise RuntimeError(\"another\")');"
        "from rewards.vision.torchvision_shim import mend_torchvision; mend_torchvision()"
    )
    assert "RuntimeError: another" in run(code)


@pytest.mark.skipif(find_spec("open_clip") is not None, reason="open_clip is installed here")
def test_without_open_clip_the_message_names_the_environment() -> None:
    from rewards.vision.torchvision_shim import import_open_clip

    with pytest.raises(ImportError, match=r"make_reward_env\.sh open-clip"):
        import_open_clip()
