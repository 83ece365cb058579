"""Rules of the code that handles what strangers send."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import ROOT

FILES = sorted(
    [
        *(ROOT / "rewards/client").glob("*.py"),
        *(ROOT / "rewards/server").glob("*.py"),
        *(ROOT / "rewards" / name for name in ("wire.py", "serve.py", "ping.py", "contract.py", "registry.py")),
    ]
)
# What turns bytes into running code, or text into a file or an address.
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "yaml", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "import_module", "load_module", "fromfile", "memmap"}
# A clock that somebody can set.
FORBIDDEN_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "dt.datetime.now"}


def violations(source: str) -> list[str]:
    """Every forbidden import or call, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        found += [f"{node.lineno}: import {name}" for name in names if FORBIDDEN_MODULES & set(name.split("."))]
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call.split(".")[-1] in FORBIDDEN_CALLS or call in FORBIDDEN_CLOCKS or call in ("np.load", "numpy.load"):
                found.append(f"{node.lineno}: {call}")
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            found.append(f"{node.value.lineno}: {node.arg}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_comes_over_a_socket_can_be_run_and_no_clock_can_be_set(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "from joblib.externals import cloudpickle",
        "def f():\n    import torch.serialization",
        "eval('1')",
        "importlib.import_module(name)",
        "np.load(file)",
        "numpy.lib.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "time.time()",
        "datetime.now()",
    ],
)
def test_the_rule_sees_what_it_forbids(source: str) -> None:
    assert violations(source)


def test_a_client_and_a_server_need_no_torch_and_nothing_of_the_trainer() -> None:
    code = (
        "import sys; import rewards.client.remote, rewards.client.inproc, rewards.client.supervisor, rewards.ping,"
        "rewards.serve, rewards.server.app;"
        "print([name for name in ('torch', 'adagrpo_train', 'transformers', 'hydra') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_zstandard_a_server_takes_plain_requests_only() -> None:
    code = (
        "import sys; sys.modules['zstandard'] = None; import rewards.server.compression as module;"
        "print(module.ENCODINGS)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "()"
