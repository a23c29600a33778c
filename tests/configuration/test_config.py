"""What `validate` accepts, and its errors for every field and combination that cannot run."""

import dataclasses
from functools import reduce

import pytest

from udm_grpo.config import ConfigError, RewardsConfig, RunConfig, ScorerConfig, as_dict
from udm_grpo.configuration.config_checks import validate
from udm_grpo.configuration.config_fields import field_values, member, settle


def runnable() -> RunConfig:
    """Return the defaults, with the three fields that have none."""
    config = RunConfig()
    config.model.path = "folder"
    config.prompts.train = "train.jsonl"
    config.prompts.heldout = "heldout.jsonl"
    return config


def change(config: RunConfig, name: str, value: object) -> None:
    """Set a field by its dotted name."""
    *sections, field = name.split(".")
    for section in sections:
        config = getattr(config, section)
    assert hasattr(config, field), name
    setattr(config, field, value)


def problems(**changes: object) -> list[str]:
    """Return the lines of the error about runnable() with these changes (a__b stands for a.b); [] without an error."""
    config = runnable()
    for name, value in changes.items():
        change(config, name.replace("__", "."), value)
    try:
        validate(config)
    except ConfigError as error:
        heading, *lines = str(error).splitlines()
        assert heading == "this configuration cannot run:"
        assert all(line.startswith("  - ") and line.endswith(".") for line in lines)
        return [line.removeprefix("  - ") for line in lines]
    return []


def test_the_defaults_run_once_the_required_fields_are_given():
    assert problems() == []


def test_the_defaults_alone_name_each_missing_field():
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig())
    for name in ("model.path", "prompts.train", "prompts.heldout"):
        assert f"{name} is empty" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    "name",
    [
        "model.dtype",
        "model.attention",
        "model.remat",
        "grpo.trajectory",
        "grpo.action",
        "optimizer.schedule",
    ],
)
def test_a_choice_names_what_may_be_chosen(name):
    (line,) = problems(**{name.replace(".", "__"): "nosuch"})
    section, field = name.split(".")
    default = getattr(getattr(RunConfig(), section), field)
    assert line.startswith(f"{name} is 'nosuch'; set it to one of ")
    assert default in line


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("iterations", 1),
        ("rollout.prompts", 1),
        ("rollout.steps", 1),
        ("rollout.micro_batch", 0),
        ("rollout.group_size", 2),
        ("rollout.guidance_scale", 1),
        ("rollout.shift", 0),
        ("grpo.trained_steps", 1),
        ("grpo.window_starts", 1),
        ("grpo.updates_per_rollout", 1),
        ("grpo.minibatches", 1),
        ("grpo.kl_weight", 0),
        ("grpo.clip_range", 0),
        ("optimizer.micro_batch", 0),
        ("optimizer.learning_rate", 0),
        ("optimizer.warmup_updates", 0),
        ("optimizer.ema_every", 1),
        ("optimizer.weight_decay", 0),
        ("evaluation.prompts", 1),
        ("evaluation.final_prompts", 1),
        ("evaluation.images_per_prompt", 1),
        ("evaluation.batch", 1),
        ("evaluation.picture_prompts", 1),
        ("evaluation.every", 0),
        ("evaluation.picture_every", 0),
        ("evaluation.extremes", 0),
        ("checkpoint.every", 0),
        ("checkpoint.keep", 1),
        ("model.text_length", 0),
        ("model.logit_rows", 1),
        ("model.height", 1),
        ("model.width", 1),
    ],
)
def test_a_number_that_is_too_small_is_named_with_the_least(name, least):
    lines = problems(**{name.replace(".", "__"): least - 1})
    assert f"{name} is {least - 1}; set it to at least {least}." in lines


# The remaining ranges of config.py. A field whose bad value would fail only in the middle of a run belongs here.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grpo.advantage_clip", 0.0),
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", -0.1),
        ("evaluation.steps", (10, 0)),
        ("evaluation.guidance_scales", (3.0, 0.5)),
        ("evaluation.guidance_scales", ()),
        ("optimizer.ema_decay", 1.0),
        ("optimizer.ema_decay", -0.1),
        ("optimizer.max_grad_norm", 0.0),
        ("optimizer.learning_rate", float("nan")),
    ],
)
def test_a_number_out_of_its_range_is_named_with_its_value(name, value):
    (line,) = problems(**{name.replace(".", "__"): value})
    assert line.startswith(f"{name} is ")
    assert "; set it " in line


def test_no_number_of_a_configuration_may_be_infinite_or_not_a_number():
    """Every float of every section, numbers in dicts and tuples, and those that float32 cannot hold."""
    config = RunConfig()
    floats = [name for name, value in field_values(config) if isinstance(value, float)]
    assert len(floats) > 20
    for name in floats:
        for bad in (float("inf"), float("-inf"), float("nan"), 1e39):
            *path, last = name.split(".")
            section = reduce(member, path, config)
            before = getattr(section, last)
            setattr(section, last, bad)
            with pytest.raises(ConfigError) as caught:
                validate(config)
            setattr(section, last, before)
            assert str(caught.value).count(f"  - {name} is ") == 1, (name, bad)
    assert problems(prompts__tag_weights={"colors": float("inf")}) == [
        "prompts.tag_weights.colors is inf; set it to a finite number that float32 can hold."
    ]
    assert "evaluation.steps[1] is above 10^39; set it" in problems(evaluation__steps=(10, 10**400))[0]
    with pytest.raises(ConfigError, match=r"rewards.scorers.a.options.low is inf; set it to a finite number"):
        settle(RunConfig(rewards=RewardsConfig({"a": ScorerConfig(options={"low": float("inf")})})))  # type: ignore[dict-item]


def test_evaluation_needs_a_number_of_steps():
    assert problems(evaluation__steps=()) == ["evaluation.steps is empty; name at least one number of rollout steps."]


def test_the_trained_window_has_to_fit_the_rollout():
    assert problems(rollout__steps=5) == []
    (line,) = problems(rollout__steps=4)
    assert line.startswith("grpo.window_starts + grpo.trained_steps - 1 is 5, past the rollout's 4 steps")


def test_micro_batches_need_not_divide_what_they_split():
    assert problems(rollout__micro_batch=48, optimizer__micro_batch=256) == []


def test_milestones_and_multistep_go_together():
    assert problems(optimizer__schedule="multistep", optimizer__milestones=(3, 5)) == []
    (line,) = problems(optimizer__schedule="multistep")
    assert line.startswith("optimizer.schedule is multistep without optimizer.milestones")
    (line,) = problems(optimizer__milestones=(3,))
    assert line.startswith("optimizer.milestones takes effect only with optimizer.schedule=multistep")


def test_minibatches_have_to_divide_the_images():
    assert problems(grpo__minibatches=4) == []
    (line,) = problems(grpo__minibatches=3)
    assert line.startswith("grpo.minibatches is 3, which does not divide rollout.prompts x rollout.group_size = 128")


def test_an_average_that_would_never_move_is_refused():
    assert problems(optimizer__ema_decay=0.99, optimizer__ema_every=100, iterations=100) == []
    (line,) = problems(optimizer__ema_every=100)
    assert line.startswith("optimizer.ema_every takes effect only with optimizer.ema_decay above 0")
    (line,) = problems(optimizer__ema_decay=0.99, optimizer__ema_every=100, iterations=99)
    assert line.startswith("optimizer.ema_every is 100, but the run has 99 optimizer steps")
    assert problems(optimizer__ema_decay=0.99, optimizer__ema_every=100, iterations=25, grpo__minibatches=4) == []


@pytest.mark.parametrize(
    ("sizes", "fine"),
    [
        ((-1, 1, 1), True),
        ((2, -1, 2), True),
        ((2, 2, 2), True),
        ((-1, -1, 1), False),
        ((0, 1, 1), False),
        ((1, -2, 1), False),
    ],
)
def test_at_most_one_mesh_size_takes_the_rest(sizes, fine):
    lines = problems(mesh__data=sizes[0], mesh__fsdp=sizes[1], mesh__tensor=sizes[2])
    assert len(lines) == (0 if fine else 1)
    assert fine or lines[0].startswith("mesh is {'data': ")


def test_layers_that_are_split_cannot_be_whole_on_each_device():
    assert problems(model__compute_weights="replicated", mesh__fsdp=2) == []
    (line,) = problems(model__compute_weights="replicated", mesh__tensor=2)
    assert line.startswith("model.compute_weights is replicated, but mesh.tensor=2 splits each layer; set")


def test_keeping_the_best_needs_evaluations_on_the_way():
    assert problems(checkpoint__keep_best=True) == []
    (line,) = problems(checkpoint__keep_best=True, evaluation__every=0)
    assert line.startswith("checkpoint.keep_best needs evaluations during training")


def test_all_problems_are_listed_at_once():
    lines = problems(
        iterations=0,
        model__dtype="float16",
        rollout__micro_batch=-1,
        optimizer__ema_decay=2.0,
        mesh__fsdp=0,
        prompts__heldout="",
    )
    named = ("iterations", "model.dtype", "rollout.micro_batch", "optimizer.ema_decay", "mesh", "prompts.heldout")
    assert len(lines) == len(named)
    for name in named:
        assert any(name in line for line in lines), name


def test_the_dict_of_a_config_makes_the_same_config_again():
    config = runnable()
    nested = as_dict(config)
    sections = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    again = {
        name: sections[name](**value) if name in nested and isinstance(value, dict) else value
        for name, value in nested.items()
    }
    scorers = {part: ScorerConfig(**values) for part, values in nested["rewards"]["scorers"].items()}
    again["rewards"] = RewardsConfig(scorers)
    assert RunConfig(**again) == config


@pytest.mark.parametrize(
    ("change_of", "line"),
    [
        ({"deadline_s": 0.0}, "rewards.scorers.shapes.deadline_s is 0.0; set it above 0."),
        ({"start_timeout_s": 0.0}, "rewards.scorers.shapes.start_timeout_s is 0.0; set it above 0."),
        ({"max_restarts": -1}, "rewards.scorers.shapes.max_restarts is -1; set it to at least 0."),
        ({"replicas": 0}, "rewards.scorers.shapes.replicas is 0; set it to at least 1."),
        ({"weight": float("inf")}, "rewards.scorers.shapes.weight is inf; set it to a finite number."),
    ],
)
def test_a_scorer_that_cannot_be_is_named(change_of, line):
    assert problems(rewards__scorers={"shapes": ScorerConfig(**change_of)}) == [line]


def test_a_recipe_that_starts_replicas_can_be_given_addresses():
    assert problems(rewards__scorers={"shapes": ScorerConfig(replicas=2, addresses=("unix:/a",))}) == []


def test_no_scorer_at_all_is_refused():
    assert problems(rewards__scorers={}) == ["rewards.scorers is empty; name at least one."]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lora__rank": -1}, "lora.rank is -1; set it to at least 0."),
        ({"lora__alpha": 0.0}, "lora.alpha is 0.0; set it to a finite number above 0."),
        ({"lora__alpha": float("inf")}, "lora.alpha is inf; set it to a finite number above 0."),
        (
            {"lora__targets": ("q_proj", "head")},
            "lora.targets is ('q_proj', 'head'): 'head' matches nothing; choose from q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj, or patterns of these such as *_proj.",
        ),
    ],
)
def test_an_adapter_that_cannot_be_is_named(changes, line):
    assert problems(**changes) == [line]
