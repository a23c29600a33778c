"""--config configs/x.py[:variant] --config.field=value, and what a user is told about a line that cannot be read."""

import sys

import pytest

from udm_grpo.command_line import field_names, parse
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.config_checks import validate

CONFIG = '''
"""A config file as a user writes one."""

from udm_grpo.config import RunConfig


def get_config(variant: str = "") -> RunConfig:
    """The run, or a short one."""
    config = RunConfig(iterations=300)
    config.model.path = "some/folder"
    config.prompts.train = config.prompts.heldout = "some/prompts.txt"
    config.prompts.tag_weights = {"counting": 2.0}
    config.rewards.scorers["shapes"].options = {"threshold": "0.3"}
    if variant == "smoke":
        config.iterations = 2
    elif variant:
        raise ValueError(f"there is no variant {variant!r}; there is smoke")
    return config
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(CONFIG)
    return str(path)


def test_a_config_file_alone_is_taken_as_it_is(file):
    config = parse([f"--config={file}"])
    assert isinstance(config, RunConfig)
    assert (config.iterations, config.model.path, config.seed) == (300, "some/folder", 0)
    validate(config)


def test_a_variant_is_handed_to_get_config(file):
    assert parse(["--config", f"{file}:smoke"]).iterations == 2
    assert parse([f"--config={file}:smoke", "--config.seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("argument", "section", "field", "wanted"),
    [
        ("--config.iterations=5", None, "iterations", 5),
        ("--config.output_dir=outputs/a b", None, "output_dir", "outputs/a b"),
        ("--config.checkpoint.resume=latest", "checkpoint", "resume", "latest"),
        ("--config.rollout.prompts=4", "rollout", "prompts", 4),
        ("--config.optimizer.learning_rate=1e-3", "optimizer", "learning_rate", 1e-3),
        ("--config.optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
        ("--config.grpo.global_std=true", "grpo", "global_std", True),
        ("--config.logging.tensorboard", "logging", "tensorboard", True),
        ("--config.evaluation.steps=(10,25)", "evaluation", "steps", (10, 25)),
        ("--config.evaluation.steps=10,25", "evaluation", "steps", (10, 25)),
        ("--config.evaluation.steps=10", "evaluation", "steps", (10,)),
        ("--config.prompts.tag_weights.counting=0.5", "prompts", "tag_weights", {"counting": 0.5}),
        ("--config.prompts.tag_weights.colors=3", "prompts", "tag_weights", {"counting": 2.0, "colors": 3.0}),
    ],
)
def test_a_field_is_overridden(file, argument, section, field, wanted):
    config = parse([f"--config={file}", argument])
    found = getattr(config if section is None else getattr(config, section), field)
    assert found == wanted
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert [type(value) for value in found.values()] == [type(value) for value in wanted.values()]


@pytest.mark.parametrize(
    ("argument", "part", "field", "wanted"),
    [
        ("shapes.options.threshold=0.5", "shapes", "options", {"threshold": "0.5"}),
        ("shapes.options.device=cpu", "shapes", "options", {"threshold": "0.3", "device": "cpu"}),
        ("shapes.environment.CUDA_VISIBLE_DEVICES=0", "shapes", "environment", {"CUDA_VISIBLE_DEVICES": "0"}),
        ("shapes.addresses=unix:/a,unix:/b", "shapes", "addresses", ("unix:/a", "unix:/b")),
        ("jpeg.weight=0.5", "jpeg", "weight", 0.5),
        ("mine.options.a.b=c", "mine", "options", {"a.b": "c"}),
    ],
)
def test_a_scorer_is_changed_or_added_by_its_name(file, argument, part, field, wanted):
    config = parse([f"--config={file}", f"--config.rewards.scorers.{argument}"])
    assert getattr(config.rewards.scorers[part], field) == wanted
    assert set(config.rewards.scorers) == {"shapes", part}
    validate(config)


def test_several_overrides_and_the_last_one_counts(file):
    config = parse([f"--config={file}", "--config.seed=1", "--config.mesh.data=2", "--config.seed=3"])
    assert (config.seed, config.mesh.data) == (3, 2)


def test_the_given_line_is_read_and_not_that_of_the_process(file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["other", f"--config={file}", "--config.iterations=99", "--config.seed=99"])
    config = parse([f"--config={file}", "--config.seed=7"])
    assert (config.iterations, config.seed) == (300, 7)


@pytest.mark.parametrize(
    ("argument", "suggested"),
    [
        ("--config.iteration=3", "iterations"),
        ("--config.rollout.promts=3", "rollout.prompts"),
        ("--config.learning_rate=3", "optimizer.learning_rate"),
        ("--config.rollout=3", "rollout.prompts"),
        ("--config.checkpoint.evry", "checkpoint.every"),
    ],
)
def test_an_unknown_field_suggests_the_nearest(file, argument, suggested):
    name = argument.removeprefix("--").split("=")[0]
    with pytest.raises(ConfigError, match=rf"{name}\b.*no such field.* {suggested}\b"):
        parse([f"--config={file}", argument])


def test_a_field_like_no_other_lists_all(file):
    with pytest.raises(ConfigError, match=r"zzzz.*output_dir.*grpo\.kl_weight.*logging\.wandb"):
        parse([f"--config={file}", "--config.zzzz=1"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", "abc"),
        ("iterations", "1.5"),
        ("optimizer.learning_rate", "fast"),
        ("logging.tensorboard", "maybe"),
        ("evaluation.steps", "(1.5,)"),
        ("optimizer.milestones", "('a',)"),
        ("prompts.tag_weights.counting", "often"),
        ("rollout.prompts.x", "3"),
        ("rewards.scorers.shapes.options", "3"),
        ("rewards.scorers", "shapes"),
        ("rewards.scorers.jpeg", "3"),
        ("rewards.scorers.jpeg.wait", "3"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_the_field_s_name(file, field, value):
    with pytest.raises(ConfigError, match=field):
        validate(parse([f"--config={file}", f"--config.{field}={value}"]))


def test_a_value_that_is_missing_is_refused_by_the_field_s_name(file):
    with pytest.raises(ConfigError, match=r"iterations"):
        parse([f"--config={file}", "--config.iterations"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*nowhere\.py"):
        parse([f"--config={tmp_path / 'nowhere.py'}"])


def test_no_file_at_all_says_what_to_give():
    with pytest.raises(ConfigError, match=r"--config must name a file"):
        parse([])


def test_an_unknown_variant_passes_on_the_file_s_own_words(file):
    with pytest.raises(ConfigError, match=r"no variant 'smok'; there is smoke"):
        parse([f"--config={file}:smok"])


def test_a_file_that_makes_something_else_is_refused(tmp_path):
    path = tmp_path / "other.py"
    path.write_text("def get_config():\n    return {'iterations': 3}\n")
    with pytest.raises(ConfigError, match=r"returns a RunConfig; found .*dict"):
        parse([f"--config={path}"])


def test_extra_words_are_refused(file):
    with pytest.raises(ConfigError, match=r"unexpected seed=3 fast"):
        parse([f"--config={file}", "seed=3", "fast"])


@pytest.mark.parametrize("argument", ["--seed=3", "-x", "--configs.seed=3"])
def test_an_unknown_flag_is_refused(file, argument):
    with pytest.raises(ConfigError, match=rf"{argument.strip('-').split('=')[0]}"):
        parse([f"--config={file}", argument])


def test_every_field_has_one_dotted_name():
    names = field_names(RunConfig())
    assert len(set(names)) == len(names)
    some = {"iterations", "model.path", "rollout.prompts", "rewards.scorers.shapes.environment", "mesh.fsdp"}
    assert some <= set(names)
