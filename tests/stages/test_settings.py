"""Every mistake on the command line is named, with the nearest right word, before any work is done."""

import pytest

from adagrpo_train import build, continuation
from adagrpo_train.cli.train import main
from adagrpo_train.errors import AdaGRPOError, ConfigError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.settings import group_options, read_settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group_sise=4", "unknown key 'group_sise'; did you mean group_size"),
        ("algoritm=flow_grpo", "unknown key 'algoritm'; did you mean algorithm"),
        ("algorithm=flow_grop", "algorithm=flow_grop: no such option; did you mean flow_grpo"),
        ("curriculum=bondary", "did you mean boundary"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean optimizer.lr"),
        ("+group_sise=4", "unknown key 'group_sise'; did you mean group_size"),
        ("+curriculum.alhpa=0.5", "unknown key 'curriculum.alhpa'; did you mean curriculum.alpha"),
        ("+evaluation.evry=3", "unknown key 'evaluation.evry'; did you mean evaluation.every"),
        ("iterations=many", "iterations=many: expected a whole number"),
        ("iterations=2.5", "iterations=2.5: expected a whole number"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected a number"),
        ("curriculum.per_rank=3", "curriculum.per_rank=3: expected true or false"),
        ("iterations=", "iterations=: expected a whole number"),
        ("algorithm", "algorithm"),
        ("reward=hps", "reward=hps: no such option"),
        ("group_size=null", "group_size=null: expected a whole number"),
        ("model.path=null", "model.path=null: expected"),
        ("~seed", "seed was deleted"),
        ("~curriculum.alpha", "curriculum.alpha was deleted"),
        ("model=null", "model=null"),
        ("resume=5", "resume=5: expected text"),
        ("prompts.path=5", "prompts.path=5: expected text"),
        ("update_micro_batch=null", "update_micro_batch=null: expected a whole number"),
        ("network.compile=1", "network.compile=1: expected true or false"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings([override])
    assert message in str(caught.value)


def test_a_whole_number_is_a_number() -> None:
    assert read_settings(["optimizer.lr=1"]).values["optimizer"]["lr"] == 1


def test_groups_are_the_whole_switch() -> None:
    values = read_settings(["algorithm=dance_grpo", "curriculum=boundary", "advantage=cross_level"]).values
    assert values["algorithm"]["transition"]["_target_"].endswith("ConstantSDE")
    assert values["plan"]["_target_"].endswith("RandomSteps")
    assert values["curriculum"]["_target_"].endswith("Boundary")
    assert values["advantage"]["_target_"].endswith("CrossLevel")


def test_the_preset_is_the_same_as_its_two_groups_and_yields_to_them() -> None:
    spelt = read_settings(["curriculum=boundary", "advantage=cross_level"]).values
    assert read_settings(["adagrpo=on"]).values == spelt
    assert read_settings(["adagrpo=on", "curriculum=hardest"]).values["curriculum"]["_target_"].endswith("Hardest")


def test_a_plan_can_be_chosen_over_the_one_of_the_algorithm() -> None:
    assert read_settings(["algorithm=dance_grpo", "plan=branch"]).values["plan"]["_target_"].endswith("Branch")


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in group_options().items() for o in options])
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    read_settings([f"{group}={option}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["group_size=1"], "group_size=1"),
        (["algorithm.transition.noise_level=0"], "noise_level=0: a policy gradient needs stochastic steps"),
        (["algorithm=dance_grpo", "algorithm.transition.eta=0"], "needs stochastic steps"),
        (["algorithm=flow_cps", "algorithm.transition.noise_level=1.2"], "(0, 1]"),
        (["plan=fixed", "plan.noisy=[9]"], "steps [9] are outside"),
        (["plan=fixed", "plan.noisy=[]"], "plan.noisy is empty"),
        (["plan=branch", "plan.at=[5]"], "outside 0 .. 4"),
        (["model.path=./nowhere"], "model.path=./nowhere: no diffusers pipeline there"),
        (["model.resolution=30"], "must be a multiple of"),
        (["model.guidance_scale=0.5"], "guidance_scale=0.5"),
        (["prompts.path=nowhere.txt"], "nowhere.txt: no such file"),
        (["curriculum=boundary", "curriculum.candidates=9", "curriculum.chosen=10"], "chosen <= candidates"),
        (["curriculum=boundary", "curriculum.candidates=99999"], "holds only"),
        (["updates_per_iteration=3", "inner_epochs=2"], "must be a multiple of inner_epochs"),
        (["iterations=0"], "iterations=0"),
        (["advantage=cross_level", "advantage.mode=best"], "choose official or absolute"),
        (["trainable.rank=0"], "trainable.rank=0"),
        (["weight_average.decay=1.0"], "weight_average.decay"),
        (["engine.device=cuda9"], "engine.device=cuda9"),
        (["plan=branch", "plan.at=[a]"], "plan.at=['a']: expected a list"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate"),
        (["reward.shapes.weights={smooth: nan}"], "reward.shapes.weights.smooth=nan"),
        (["reward.shapes.weights={smooth: much}"], "reward.shapes.weights.smooth=much"),
        (["checkpoint.keep=0"], "checkpoint.keep=0"),
        (["advantage.limit=-1"], "advantage.limit=-1"),
        (["curriculum.chosen=0"], "curriculum.chosen=0"),
        (["trainable.alpha=0"], "trainable.alpha=0"),
        (["model.decode_batch=0"], "model.decode_batch=0"),
        (["updates_per_iteration=999"], "lower micro_batch or updates_per_iteration"),
        (["prompts.evaluation_path=nowhere"], "prompts.evaluation_path=nowhere: no such file"),
        (["update_micro_batch=49"], "update_micro_batch=49: must be from 1 to micro_batch=48"),
        (["network.autocast=float16"], "network.autocast=float16: choose bfloat16 or null"),
        (["prompt_cache=/dev/null/cache"], "prompt_cache=/dev/null/cache: cannot be written to"),
        (["resume=nowhere"], "/nowhere: no such folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(overrides: list[str], message: str, tmp_path) -> None:
    with pytest.raises(AdaGRPOError) as caught:
        settings = read_settings(overrides)
        engine: Engine = build.make_engine(settings)
        snapshot = continuation.open_snapshot(settings, engine)
        build.make_trainer(settings, engine, tmp_path, snapshot)
    assert message in str(caught.value)


def test_the_command_line_prints_the_mistake_and_returns_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["group_sise=4"]) == 2
    assert capsys.readouterr().err == "error: unknown key 'group_sise'; did you mean group_size?\n"
    assert main(["--colour"]) == 2
    assert "unknown option --colour" in capsys.readouterr().err


def test_help_names_every_group_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for group, options in group_options().items() for name in (group, *options))


def test_the_composed_configuration_can_be_read_before_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "algorithm=flow_cps"]) == 0
    assert "adagrpo_train.algorithms.transitions.CPS" in capsys.readouterr().out


@pytest.mark.parametrize("choice", [f"{g}={o}" for g in ("debug", "experiment") for o in group_options()[g]])
def test_named_settings_set_nothing_that_does_not_exist(choice: str) -> None:
    plain, chosen = read_settings([]).values, read_settings([choice]).values
    for section in ("evaluation", "checkpoint", "weight_average", "lr_schedule"):
        assert chosen[section].keys() == plain[section].keys()
