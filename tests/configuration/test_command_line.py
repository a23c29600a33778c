"""--config configs/x.py[:variant] --config.field=value, and the errors about a line that cannot be read."""

import sys
from dataclasses import fields

import pytest

from udm_grpo import train
from udm_grpo.config import ConfigError, OptimizerConfig, RunConfig, ScorerConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.configuration.config_fields import documentation, field_names

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
    ("argument", "section", "field", "expected"),
    [
        ("--config.iterations=5", None, "iterations", 5),
        ("--config.output_dir=outputs/a b", None, "output_dir", "outputs/a b"),
        ("--config.checkpoint.resume=latest", "checkpoint", "resume", "latest"),
        ("--config.rollout.prompts=4", "rollout", "prompts", 4),
        ("--config.optimizer.learning_rate=1e-3", "optimizer", "learning_rate", 1e-3),
        ("--config.optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
        ("--config.grpo.global_std=true", "grpo", "global_std", True),
        ("--config.grpo.global_std=yes", "grpo", "global_std", True),
        ("--config.logging.tensorboard", "logging", "tensorboard", True),
        ("--noconfig.logging.tensorboard", "logging", "tensorboard", False),
        ("--config.evaluation.steps=(10,25)", "evaluation", "steps", (10, 25)),
        ("--config.evaluation.steps=10,25", "evaluation", "steps", (10, 25)),
        ("--config.evaluation.steps=10", "evaluation", "steps", (10,)),
        ("--config.evaluation.steps=[10, 25]", "evaluation", "steps", (10, 25)),
        ("--config.optimizer.milestones=", "optimizer", "milestones", ()),
        ("--config.lora.targets=q_proj,v_proj", "lora", "targets", ("q_proj", "v_proj")),
        ("--config.lora.targets=('q_proj', 'v_proj')", "lora", "targets", ("q_proj", "v_proj")),
        ("--config.lora.targets=()", "lora", "targets", ()),
        ("--config.output_dir=", None, "output_dir", ""),
        ("--config.prompts.tag_weights.counting=0.5", "prompts", "tag_weights", {"counting": 0.5}),
        ("--config.prompts.tag_weights.colors=3", "prompts", "tag_weights", {"counting": 2.0, "colors": 3.0}),
        (
            "--config.prompts.tag_weights={'position': 7, 'a b=c': 0.5}",
            "prompts",
            "tag_weights",
            {"position": 7.0, "a b=c": 0.5},
        ),
        ("--config.prompts.tag_weights={}", "prompts", "tag_weights", {}),
        ("--config.prompts.tag_weights=", "prompts", "tag_weights", {}),
    ],
)
def test_a_field_is_overridden(file, argument, section, field, expected):
    config = parse([f"--config={file}", argument])
    value = getattr(config if section is None else getattr(config, section), field)
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(expected, dict):
        assert [type(entry) for entry in value.values()] == [type(entry) for entry in expected.values()]


@pytest.mark.parametrize(
    ("argument", "part", "field", "expected"),
    [
        ("shapes.options.threshold=0.5", "shapes", "options", {"threshold": "0.5"}),
        ("shapes.options.device=cpu", "shapes", "options", {"threshold": "0.3", "device": "cpu"}),
        ("shapes.environment.CUDA_VISIBLE_DEVICES=0", "shapes", "environment", {"CUDA_VISIBLE_DEVICES": "0"}),
        ("shapes.addresses=unix:/a,unix:/b", "shapes", "addresses", ("unix:/a", "unix:/b")),
        ("jpeg.weight=0.5", "jpeg", "weight", 0.5),
        ("mine={'options': {'a.b': 'c'}}", "mine", "options", {"a.b": "c"}),
    ],
)
def test_a_scorer_is_changed_or_added_by_its_name(file, argument, part, field, expected):
    config = parse([f"--config={file}", f"--config.rewards.scorers.{argument}"])
    assert getattr(config.rewards.scorers[part], field) == expected
    assert set(config.rewards.scorers) == {"shapes", part}
    validate(config)


def test_a_setting_of_a_scorer_that_the_config_lacks_does_not_add_it(file):
    """Only its weight or its scorer adds it, before or after."""
    with pytest.raises(ConfigError, match=r"scorers\.ocr\.devices: .* no rewards\.scorers\.ocr; it has shapes\."):
        parse([f"--config={file}", "--config.rewards.scorers.ocr.devices=7", "--config.seed=1"])
    with pytest.raises(ConfigError, match=r"no rewards\.scorers\.shape; it has shapes"):
        parse([f"--config={file}", "--config.rewards.scorers.shape.options.threshold=0.5"])
    with pytest.raises(ConfigError, match=r"no rewards\.scorers\.shapes; it has none"):
        parse([f"--config={file}", "--config.rewards.scorers={}", "--config.rewards.scorers.shapes.replicas=2"])
    for settings in (["options.a=b", "scorer=jpeg"], ["weight=0", "options.a=b"]):
        words = [f"--config.rewards.scorers.more.{setting}" for setting in settings]
        assert parse([f"--config={file}", *words]).rewards.scorers["more"].options == {"a": "b"}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (["options={}"], {}),
        (["options="], {}),
        (["options={}", "options.device=cpu"], {"device": "cpu"}),
        (["options.device=cpu", "options={'threshold': 0.5}"], {"threshold": "0.5"}),
        (["options.device=cpu", "options.threshold=1e3"], {"device": "cpu", "threshold": "1e3"}),
        (["options.options=x"], {"threshold": "0.3", "options": "x"}),
        (
            ["options={'class': 'a', 'b.c': 'd', 'a-b': '__import__(\"os\")'}"],
            {"class": "a", "b.c": "d", "a-b": '__import__("os")'},
        ),
    ],
)
def test_a_dict_is_set_extended_and_cleared(file, settings, options):
    words = [f"--config.rewards.scorers.shapes.{setting}" for setting in settings]
    assert parse([f"--config={file}", *words]).rewards.scorers["shapes"].options == options


@pytest.mark.parametrize(
    ("settings", "scorers"),
    [
        ([".jpeg={}"], {"shapes": ScorerConfig(options={"threshold": "0.3"}), "jpeg": ScorerConfig()}),
        ([".shapes="], {"shapes": ScorerConfig()}),
        (["={}", ".jpeg.weight=2"], {"jpeg": ScorerConfig(weight=2.0)}),
        ([".jpeg.weight=2", "={'a': {}, 'b': {'replicas': 2}}"], {"a": ScorerConfig(), "b": ScorerConfig(replicas=2)}),
        (
            [".shapes={'options': {'n': 3}, 'addresses': ('h:1', 'h:2')}"],
            {"shapes": ScorerConfig(options={"n": "3"}, addresses=("h:1", "h:2"))},
        ),
    ],
)
def test_scorers_are_set_and_cleared_as_a_dict(file, settings, scorers):
    assert (
        parse([f"--config={file}", *(f"--config.rewards.scorers{one}" for one in settings)]).rewards.scorers == scorers
    )


def test_a_number_of_the_config_file_takes_a_fraction(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(CONFIG.replace('{"counting": 2.0}', '{"counting": 2}').replace("300", "300, seed=1"))
    assert parse([f"--config={path}"]).prompts.tag_weights == {"counting": 2}
    assert (
        parse([f"--config={path}", "--config.prompts.tag_weights.counting=2.5"]).prompts.tag_weights["counting"] == 2.5
    )


def test_words_in_any_order_and_in_a_file_of_flags(file, tmp_path):
    (tmp_path / "flags").write_text("--config.seed=5\n--config.iterations=7\n")
    assert parse(["--config.seed=4", "--config", file]).seed == 4
    assert parse(["--config.seed", "4", f"--config={file}", "--config.iterations", "9"]).iterations == 9
    config = parse([f"--flagfile={tmp_path / 'flags'}", f"--config={file}", "--config.iterations=8"])
    assert (config.seed, config.iterations) == (5, 8)


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
        ("--config.rewards.scorers.shapes.option.a=1", "rewards.scorers.shapes.options"),
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
        ("rewards.scorers.shapes.options", "{'a': open('/etc/passwd')}"),
        ("rewards.scorers.shapes.options", "{'a': None}"),
        ("rewards.scorers.shapes.options", "{1: 'a'}"),
        ("rewards.scorers.shapes.options", "{"),
        ("prompts.tag_weights", "{'counting': 'often'}"),
        ("rewards.scorers.jpeg", "{'wait': 3}"),
        ("rewards.scorers.jpeg", "{'weight': 'much'}"),
        ("rewards.scorers", "{'a.b': {}}"),
        ("evaluation.steps", "10 25"),
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


@pytest.mark.parametrize(
    "words",
    [
        ["--config.output_dir"],
        ["--config.output_dir", "--config.seed=1"],
        ["--noconfig.seed"],
        ["--noconfig.grpo.global_std=1"],
    ],
)
def test_a_flag_without_its_value_takes_no_other_flag_for_it(file, words):
    with pytest.raises(ConfigError, match=words[0].partition(".")[2].partition("=")[0]):
        parse([f"--config={file}", *words])


def test_errors_are_one_line(file, capsys):
    for argument in (
        "--config.seed=a",
        "--config.sed=1",
        "--config.zzzz.y.x=1",
        "--seed=1",
        "--flagfile=nowhere",
        "--config=",
    ):
        assert train.main([f"--config={file}", argument]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1, argument


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
    with pytest.raises(ConfigError, match=r"must return a RunConfig or an ml_collections ConfigDict; found .*dict"):
        parse([f"--config={path}"])


CONFIG_DICT = """
from ml_collections import config_dict


def get_config(variant=""):
    config = config_dict.ConfigDict({"iterations": 7, "model": {"path": "some/folder"}})
    config.prompts = {"train": "some/prompts.txt", "heldout": "some/prompts.txt", "tag_weights": {"counting": 2}}
    config.rewards = config_dict.ConfigDict({"scorers": {"jpeg": {"options": {"quality": "90"}}}})
    config.evaluation = {"steps": [10, 25]}
    LINE
    return config
"""


def config_dict_file(tmp_path, line: str) -> str:
    path = tmp_path / "dict.py"
    path.write_text(CONFIG_DICT.replace("LINE", line))
    return str(path)


@pytest.mark.parametrize("line", ["", "config.lock()", "config = config_dict.FrozenConfigDict(config)"])
def test_a_config_dict_is_a_run_config_with_its_fields(tmp_path, line):
    file = config_dict_file(tmp_path, line)
    config = parse(["--config", file])
    assert isinstance(config, RunConfig)
    assert (config.iterations, config.model.path, config.seed, config.evaluation.steps) == (
        7,
        "some/folder",
        0,
        (10, 25),
    )
    assert config.rewards.scorers == {"jpeg": ScorerConfig(options={"quality": "90"})}
    validate(config)
    settings = (
        "seed=3",
        "rewards.scorers.jpeg.options.quality=80",
        "grpo.kl_weight=0.5",
        "prompts.tag_weights.counting=0.5",
    )
    config = parse(["--config", file, *(f"--config.{setting}" for setting in settings)])
    assert (config.seed, config.grpo.kl_weight, config.prompts.tag_weights) == (3, 0.5, {"counting": 0.5})
    assert config.rewards.scorers["jpeg"].options == {"quality": "80"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.iteration = 3", r"config\.iteration: there is no such field; did you mean iterations"),
        ("config.model.paht = 'x'", r"config\.model\.paht: .*model\.path"),
        ("config.rewards.scorers.jpeg.option = {}", r"rewards\.scorers\.jpeg\.option: .*options"),
        ("config.iterations = 'many'", r"get_config failed: .*iterations"),
        ("config.seed = 'many'", r"seed is 'many', of type str; its type is int"),
        ("config.seed = 1.5", r"seed is 1\.5, .* int"),
        ("config.seed = True", r"seed is True, .* int"),
        ("config.optimizer = {'learning_rate': '1e-3'}", r"optimizer\.learning_rate is '1e-3', .* float"),
        ("config.evaluation.steps = ['a']", r"evaluation\.steps\[0\] is 'a', .* int"),
        ("config.optimizer = 3", r"optimizer is 3; set it to a dict of OptimizerConfig's fields"),
        ("config.rewards.scorers = {'a': 3}", r"scorers is .*; set it to a dict of ScorerConfig's fields"),
        ("config.output_dir = config_dict.required_placeholder(str)", r"placeholder"),
        ("config.output_dir = config_dict.placeholder(str)", r"output_dir is None, .* str"),
    ],
)
def test_a_config_dict_with_a_wrong_field_is_refused(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        parse(["--config", config_dict_file(tmp_path, line)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.iteration = 3", r"config\.iteration: there is no such field; did you mean iterations"),
        ("config.grpo.kl = 0.5", r"config\.grpo\.kl: there is no such field; .*grpo\.kl_weight"),
        ("config.rewards.scorers['shapes'].option = {}", r"rewards\.scorers\.shapes\.option: .*options"),
        ("config.iterations = '3'", r"iterations is '3', of type str; its type is int"),
        (
            "config.rewards.scorers = {'shapes': {}}",
            r"rewards\.scorers\.shapes is \{\}; set it to an instance of ScorerConfig",
        ),
        ("config.rewards.scorers = ['shapes']", r"rewards\.scorers is \['shapes'\]; set it to a dict of ScorerConfig"),
        ("config.optimizer = None", r"optimizer is None; set it to an instance of OptimizerConfig"),
        ("config.prompts.tag_weights = {'counting': 'often'}", r"tag_weights\.counting is 'often', .* float"),
        ("return", r"must return a RunConfig or an ml_collections ConfigDict; found .*NoneType"),
        ("config.modle.path = 'x'", r"get_config failed: .*modle"),
        ("config.seed = sed", r"get_config failed: .*sed"),
        ("import nowhere", r"nowhere"),
        ("config.seed = = 3", r"cannot be read: .*SyntaxError"),
    ],
)
def test_a_config_file_with_a_wrong_field_is_refused(tmp_path, line, message):
    path = tmp_path / "x.py"
    path.write_text(CONFIG.replace('    if variant == "smoke":', f'    {line}\n    if variant == "smoke":'))
    with pytest.raises(ConfigError, match=message):
        parse(["--config", str(path)])


def test_paths_and_lists_of_a_config_file_are_taken(tmp_path):
    path = tmp_path / "x.py"
    lines = "import pathlib; config.model.path = pathlib.Path('a/b'); config.evaluation.steps = [10]"
    path.write_text(CONFIG.replace('    if variant == "smoke":', f'    {lines}\n    if variant == "smoke":'))
    config = parse(["--config", str(path)])
    assert (config.model.path, config.evaluation.steps) == ("a/b", (10,))


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["--config=configs/shapes.py:smoke"]).iterations == 4
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "shapes.py").write_text(CONFIG)
    assert parse(["--config=configs/shapes.py:smoke"]).iterations == 2
    with pytest.raises(ConfigError, match=r"there is no configs/nowhere\.py"):
        parse(["--config=configs/nowhere.py"])


def test_help_shows_every_field_with_its_type_and_documentation(capsys, file):
    assert train.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in field_names(RunConfig()):
        assert f"--config.{name}=" in shown
    assert f"--config.optimizer.beta2=0.95 float. {documentation(OptimizerConfig)['beta2']}" in shown
    assert "--config.evaluation.steps=(25,) tuple of int. T of an evaluation;" in shown
    assert "--config.rewards.scorers.shapes.options={} dict of str. Passed to the scorer." in shown
    assert set(documentation(OptimizerConfig)) == {field.name for field in fields(OptimizerConfig)}
    assert train.main([f"--config={file}:smoke", "-h"]) == 0
    assert "--config.iterations=2" in capsys.readouterr().out
    assert train.main(["--config=nowhere.py", "--help"]) == 2
    assert "there is no nowhere.py" in capsys.readouterr().err


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
