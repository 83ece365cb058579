"""What docker/ holds fits the repository: there is no Docker where these tests run.

Its steps were done by hand, with scripts/docker_steps.py.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.settings import read_settings
from rewards import registry
from rewards.serve import _parse
from scripts.docker_steps import Ignore, Image, copied, read

REPO = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((REPO / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOKEN = "/run/secrets/token"


def compose(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPO / "docker" / name).read_text(encoding="utf-8"))


def services() -> dict[str, dict[str, Any]]:
    return compose("compose.yaml")["services"]


def image_of(service: dict[str, Any]) -> Image:
    build = service["build"]
    assert (REPO / "docker" / build["context"]).resolve() == REPO
    return read(REPO / build["dockerfile"], build["args"])


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_reaches_the_builder(dockerfile: Path) -> None:
    ignore = Ignore((REPO / ".dockerignore").read_text(encoding="utf-8"))
    image = read(dockerfile, {})
    sources = [source for step in image.steps if step.kind == "COPY" for source in copied(step, ignore)[0]]
    assert len(sources) == len(set(sources)) > 6
    for secret in ("token", ".env", ".git", "outputs/run", "docker/token", "rewards/__pycache__", "scripts/demo.sh"):
        assert not ignore.lets_through(secret), secret


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_a_named_base_and_a_user_who_is_not_root(dockerfile: Path) -> None:
    image = read(dockerfile, {})
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", image.base)
    assert image.user == "1000:1000"
    assert any("useradd --create-home --uid 1000" in step.text for step in image.steps)
    assert image.variables["PIP_CONSTRAINT"] == "/app/docker/constraints.txt"


def test_every_requirement_of_the_images_has_one_version_that_the_project_allows() -> None:
    lines = [line for line in (REPO / "docker/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    lines += [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    extras = PROJECT["optional-dependencies"]
    for extra in ("client", "deepspeed", "serve", "open-clip", "transformers", "hpsv3", "judge", "shapes"):
        for text in [*PROJECT["dependencies"], *extras[extra]]:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            assert requirement.specifier.contains(pins[name]), text
    assert lines[:-2] == sorted(lines[:-2])
    trainer = image_of(services()["train"]).steps
    (install,) = [step.text for step in trainer if "--editable" in step.text]
    assert '--editable ".[client,deepspeed,serve]"' in install


def test_a_reward_server_is_healthy_when_it_is_ready_to_score() -> None:
    image = read(REPO / "docker/reward.Dockerfile", {})
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", image.health[-1])
    assert url and url[2] == "/readyz"
    options = _parse([*image.entrypoint[3:], *image.command])
    assert options.port == int(url[1])
    assert (options.host, str(options.token_file)) == ("0.0.0.0", TOKEN)


def test_the_composition_starts_two_rewards_with_requirements_of_their_own() -> None:
    rewards = {name: service for name, service in services().items() if name in ("shapes", "tiny-clip")}
    extras = {name: service["build"]["args"]["EXTRA"] for name, service in rewards.items()}
    assert len(set(extras.values())) == 2
    assert set(extras.values()) <= set(PROJECT["optional-dependencies"])
    for service in rewards.values():
        image = image_of(service)
        options = _parse([*image.entrypoint[3:], *service["command"]])
        # A server that can be reached from elsewhere does not start without its token.
        assert service["depends_on"] == {"token": {"condition": "service_completed_successfully"}}
        assert f"token:{Path(TOKEN).parent}:ro" in service["volumes"]
        assert registry.make(options.name, options.settings).info.name == options.name


def test_the_composition_trains_on_the_servers_it_starts() -> None:
    train = services()["train"]
    waited = {name: rule["condition"] for name, rule in train["depends_on"].items()}
    assert waited == {"shapes": "service_healthy", "tiny-clip": "service_healthy"}
    program, *overrides = train["command"]
    assert program in PROJECT["scripts"]
    rewards = read_settings(overrides).values["reward"]
    for name, section in rewards.items():
        entry = RewardEntry(name=name, **{key: value for key, value in section.items() if key != "_target_"})
        (url,) = entry.urls
        served = services()[url.removeprefix("http://").removesuffix(":9001")]
        assert served["command"][0] == entry.reward
        assert entry.token_file == TOKEN
    assert len(rewards) == 2


def test_the_token_is_drawn_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    shell, option, script = services()["token"]["entrypoint"]
    here = script.replace("/run/secrets", str(tmp_path)).replace("/app/venv/bin/python", sys.executable)
    for _ in range(2):
        subprocess.run([shell, option, here], check=True)
        drawn = (tmp_path / "token").read_text()
        assert len(drawn.strip()) == 64
        assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    (tmp_path / "token").write_text("kept\n")
    subprocess.run([shell, option, here], check=True)
    assert (tmp_path / "token").read_text() == "kept\n"


def test_volumes_are_declared_and_lie_where_the_user_may_write() -> None:
    whole = compose("compose.yaml")
    used = {volume.split(":")[0] for service in services().values() for volume in service["volumes"]}
    assert used == set(whole["volumes"])
    for service in services().values():
        made = " ".join(step.text for step in image_of(service).steps if step.kind == "RUN")
        for volume in service["volumes"]:
            target = volume.split(":")[1]
            assert volume.endswith(":ro") or re.search(rf"install --directory --owner \w+ [^&]*{target}", made), volume
        assert service["cap_drop"] == ["ALL"] and "ports" not in service and "privileged" not in service


def test_gpus_are_given_to_services_that_exist() -> None:
    gpu = compose("compose.gpu.yaml")["services"]
    assert set(gpu) == {"train", "tiny-clip"} <= set(services())
    for name, service in gpu.items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert set(service["build"]["args"]) <= set(services()[name]["build"]["args"])
        assert service["image"] != services()[name]["image"]
        assert "deploy" not in services()[name]


def test_a_step_that_cannot_be_done_is_an_error(tmp_path: Path) -> None:
    ignore = Ignore((REPO / ".dockerignore").read_text(encoding="utf-8"))
    written = tmp_path / "Dockerfile"
    for line, message in (
        ("COPY nowhere ./", "no such file"),
        ("COPY tests ./", "dockerignore"),
        ('SHELL ["sh"]', "not known"),
    ):
        written.write_text(f"FROM a:1.2.3-b\n{line}\n")
        with pytest.raises(ValueError, match=message):
            copied(read(written, {}).steps[0], ignore)
    with pytest.raises(ValueError, match="declares no ARG EXTRAS"):
        read(REPO / "docker/reward.Dockerfile", {"EXTRAS": "shapes"})
