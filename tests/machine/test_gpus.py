"""GPUs of scorers and of the trainer, with a stand-in for nvidia-smi on PATH."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import torch
from fake_gpus import machine

from rewards_bridge.client import BridgeConfig
from rewards_bridge.errors import UsageError
from rewards_bridge.peer import scorer_arguments
from rewards_bridge.scorers import with_device
from rewards_bridge.server import ServeConfig, _limit_memory
from scripts import demo
from udm_grpo import evaluate
from udm_grpo.config import ConfigError, RewardsConfig, ScorerConfig
from udm_grpo.machine import gpu_split
from udm_grpo.machine.gpu_split import device_problems, reserved
from udm_grpo.machine.gpus import visible_gpus
from udm_grpo.scoring.rewards import bridge_configs


def placed(
    environment: dict[str, str], trainer: bool = True, fraction: float = 0.0, **devices: Any
) -> tuple[dict[str, tuple[str, ...]], dict[str, str], tuple[str, ...]]:
    """Return (the scorers' devices, the changes of the environment meanwhile, the description)."""
    scorers = {
        name: value if isinstance(value, ScorerConfig) else ScorerConfig(devices=value)
        for name, value in devices.items()
    }
    before = dict(environment)
    with reserved(RewardsConfig(scorers, fraction), environment, trainer) as (rewards, lines):
        changed = {name: value for name, value in environment.items() if before.get(name) != value}
        assigned = {name: scorer.devices for name, scorer in rewards.scorers.items()}
    assert environment == before, "everything is put back"
    return assigned, changed, lines


@pytest.fixture(autouse=True)
def without_gpus_in_jax(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", list)


@pytest.mark.parametrize(
    ("variable", "ids"),
    [
        (None, "01234567"),
        ("4,5", "45"),
        ("5, 4", "54"),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        ("3,8,4", "3"),  # CUDA stops at the first that it does not know
    ],
)
def test_gpus_are_those_that_cuda_would_show(tmp_path, variable, ids):
    environment = machine(tmp_path, 8, **({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}))
    assert "".join(visible_gpus(environment).ids) == ids


def test_a_machine_without_a_driver_or_nvidia_smi_has_no_gpus(tmp_path):
    assert visible_gpus(machine(tmp_path, 0)).ids == ()
    assert visible_gpus({"PATH": "/nowhere"}).ids == ()
    assert visible_gpus({"PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": "0,1"}).ids == ("0", "1")


def test_one_process_a_gpu_and_the_trainer_has_the_rest(tmp_path):
    assigned, changed, lines = placed(machine(tmp_path, 8), geneval=("6", "7"))
    assert assigned == {"geneval": ("6", "7")}
    assert changed == {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert lines == ("scorer geneval: GPU 6,7", "trainer: GPU 0,1,2,3,4,5")


def test_gpus_are_called_as_the_environment_calls_them(tmp_path):
    environment = machine(tmp_path, 8, CUDA_VISIBLE_DEVICES="GPU-33aa,GPU-44aa-bb,5")
    assigned, changed, _ = placed(environment, a=("4",), b=("GPU-55",))
    assert assigned == {"a": ("GPU-44aa-bb",), "b": ("5",)}
    assert changed == {"CUDA_VISIBLE_DEVICES": "GPU-33aa"}


@pytest.mark.parametrize(
    ("count", "trainer", "platforms", "expected", "left"),
    [
        (8, True, "cuda", ("7",), "0,1,2,3,4,5,6"),
        (2, True, "", ("1",), "0"),
        (1, True, "cuda", ("cpu",), None),
        (0, True, "cuda", ("cpu",), None),
        (1, False, "cuda", ("0",), None),  # evaluate: nobody else wants it
        (1, True, "cpu", ("0",), None),
        (0, True, "tpu", ("cpu",), None),
    ],
)
def test_auto_is_the_last_gpu_if_the_trainer_keeps_another(tmp_path, count, trainer, platforms, expected, left):
    environment = machine(tmp_path, count) | {"JAX_PLATFORMS": platforms}
    assigned, changed, lines = placed(environment, trainer, geneval=("auto",), pickscore=("auto",))
    assert assigned == {"geneval": expected, "pickscore": expected}
    assert changed.get("CUDA_VISIBLE_DEVICES") == left
    assert lines[0].startswith(
        f"scorer geneval: {'CPU' if expected == ('cpu',) else 'GPU ' + expected[0]} (devices is auto"
    )


def test_auto_leaves_what_others_name(tmp_path):
    assigned, changed, _ = placed(machine(tmp_path, 4), a=("3",), b=("auto",), c=("cpu",), d=("shared", "0"))
    assert assigned == {"a": ("3",), "b": ("2",), "c": ("cpu",), "d": ("0",)}
    assert changed["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_shared_gpu_is_parted_by_memory(tmp_path):
    environment = machine(tmp_path, 2)
    scorers = {"a": ScorerConfig(devices=("shared",)), "b": ScorerConfig(devices=("shared", "0", "1"))}
    with reserved(RewardsConfig(scorers), environment) as (rewards, lines):
        assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.85"
        assert "CUDA_VISIBLE_DEVICES" not in environment
        parts = {name: scorer.memory_fraction for name, scorer in rewards.scorers.items()}
    assert parts == {"a": 0.06, "b": 0.06}, "two processes on GPU 1 have what is left of 0.97"
    assert lines[0] == "scorer a: GPU 1 with the trainer, 0.06 of its memory"
    assert lines[2] == "trainer: GPU 0,1, 0.85 of their memory"
    assert placed(environment, fraction=0.5, a=("shared",))[1]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    newer = environment | {"XLA_CLIENT_MEM_FRACTION": "0.9"}  # jax refuses both variables at once
    assert placed(newer, a=("shared",))[2][0].endswith("0.07 of its memory")
    assert placed(newer, fraction=0.6, a=("shared",))[1] == {
        "XLA_CLIENT_MEM_FRACTION": "0.6",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


@pytest.mark.parametrize(
    ("devices", "fraction", "message"),
    [
        (
            {"a": ("6",), "b": ("6", "7")},
            0,
            "GPU 6 is named 2 times, in rewards.scorers.a.devices and rewards.scorers.b",
        ),
        ({"a": ("6", "6")}, 0, "GPU 6 is named 2 times, in rewards.scorers.a.devices;"),
        ({"a": ("6", "GPU-66")}, 0, "GPU 6 is named 2 times"),
        ({"a": ("6",), "b": ("shared", "6")}, 0, "GPU 6 is named 2 times"),
        ({"a": ("shared", "6", "6")}, 0, "GPU 6 is named 2 times"),
        (
            {"a": ("8",), "b": ("GPU-zz",)},
            0,
            r"names GPU 8, but nvidia-smi lists 0,1,2,3,4,5,6,7\.\n  .*names GPU GPU-zz",
        ),
        ({"a": tuple("01234567")}, 0, "the scorers have every GPU .* leave at least one to the trainer"),
        ({"a": tuple("012345678")}, 0, "names GPU 8"),
        ({"a": ("shared",)}, 0.98, "0.98 of its memory is for the trainer and 0 for scorers"),
        (
            {"a": ScorerConfig(devices=("shared",), memory_fraction=0.5)},
            0.6,
            "0.6 .* for the trainer and 0.5 for scorers",
        ),
    ],
)
def test_devices_that_cannot_be_had_are_named(tmp_path, devices, fraction, message):
    with pytest.raises(ConfigError, match=message):
        placed(machine(tmp_path, 8), fraction=fraction, **devices)


def test_gpus_of_a_machine_that_has_none_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="names GPU 6, but CUDA_VISIBLE_DEVICES is not set, and nvidia-smi lists no GPU"
    ):
        placed(machine(tmp_path, 0), a=("6",))
    with pytest.raises(ConfigError, match=r"devices is shared, but .* no GPU"):
        placed(machine(tmp_path, 0), a=("shared",))
    with pytest.raises(ConfigError, match="MEM_FRACTION is 'most'; set it to a number"):
        placed(machine(tmp_path, 1, XLA_CLIENT_MEM_FRACTION="most"), a=("shared",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": ("auto", "6")}, "devices is 'auto,6'; give GPUs as in 6,7, or auto, cpu or shared alone"),
        ({"devices": ("6", "shared")}, "devices is '6,shared'"),
        ({"devices": ("6", "")}, "devices is '6,'"),
        ({"devices": ("6",), "replicas": 2}, "starts one process for each GPU, but replicas is 2"),
        ({"devices": ("6",), "environment": {"CUDA_VISIBLE_DEVICES": "1"}}, "both say what the scorer sees"),
    ],
)
def test_devices_that_mean_nothing_are_refused_on_any_machine(fields, message):
    (problem,) = device_problems({"a": ScorerConfig(**fields)})
    assert message in problem
    assert device_problems({"a": ScorerConfig(**fields, addresses=("unix:/a",))}) == [], "nothing is started"


def test_two_scorers_may_share_a_gpu_that_the_trainer_uses_too():
    assert device_problems({name: ScorerConfig(devices=("shared", "6")) for name in "ab"}) == []


def test_jax_that_has_the_gpus_already_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu")] * 8)
    environment = machine(tmp_path, 8)
    with pytest.raises(ConfigError, match="JAX already uses 8 GPUs of this process"):
        placed(environment, a=("7",))
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_nothing_is_touched_without_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_split, "visible_gpus", lambda environment: pytest.fail("nobody asked"))
    assert placed(machine(tmp_path, 8), shapes=()) == ({"shapes": ()}, {}, ())


def test_every_process_of_a_scorer_sees_its_own_gpu():
    scorer = ScorerConfig(
        devices=("6", "GPU-77"), options={"dtype": "bfloat16"}, environment={"A": "b"}, memory_fraction=0.1
    )
    first, second = bridge_configs("pickscore", scorer, Path("kept"))
    assert first.environment == {"A": "b", "CUDA_VISIBLE_DEVICES": "6"}
    assert second.environment["CUDA_VISIBLE_DEVICES"] == "GPU-77"
    assert (first.device, first.memory_fraction, first.kept_images) == ("cuda:0", 0.1, "kept/0")
    (cpu,) = bridge_configs("pickscore", ScorerConfig(devices=("cpu",)), None)
    assert (cpu.environment, cpu.device) == ({"CUDA_VISIBLE_DEVICES": ""}, "cpu")
    (remote,) = bridge_configs("jpeg", ScorerConfig(devices=("6",), replicas=3, addresses=("unix:/a",)), None)
    assert (remote.address, remote.device, remote.environment) == ("unix:/a", None, {})
    with pytest.raises(ValueError, match="devices=auto is not decided"):
        bridge_configs("jpeg", ScorerConfig(devices=("auto",)), None)


def test_a_device_is_for_scorers_that_take_one_and_name_none():
    assert with_device("imagereward", {"model": "m"}, "cuda:0") == {"model": "m", "device": "cuda:0"}
    assert with_device("imagereward", {"device": "cpu"}, "cuda:0") == {"device": "cpu"}
    assert with_device("jpeg", {}, "cuda:0") == {}
    assert with_device("imagereward", {}, None) == {}
    words = scorer_arguments(BridgeConfig(scorer="jpeg", options={"quality": "3"}, device="cuda:0"))
    assert words == ["--scorer", "jpeg", "--options-file", "-", "--device", "cuda:0"]


def test_memory_is_limited_on_every_gpu_that_the_scorer_sees(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: asked.append(args))
    _limit_memory(0.1)
    assert asked == [(0.1, 0), (0.1, 1)]
    with pytest.raises(UsageError, match=r"--memory-fraction is 1\.5"):
        ServeConfig(scorer="jpeg", listen="unix:/a", memory_fraction=1.5)


def test_the_demo_takes_one_gpu_for_its_scorer(tmp_path):
    words = ["--base", "x", "--scorer", "pickscore", "--option", "dtype=bfloat16"]
    scorer = demo.read_scorer(demo._parser().parse_args([*words, "--devices", "auto", "--no-check-example"]))
    assert scorer == ScorerConfig("pickscore", 1.0, {"dtype": "bfloat16"}, devices=("auto",), check_example=False)
    assert placed(machine(tmp_path, 2), pickscore=scorer)[0] == {"pickscore": ("1",)}
    assert demo.read_scorer(demo._parser().parse_args(words)).devices == ()
    with pytest.raises(demo.DemoError, match="--devices is 6,7; the demo scores in one process, so name one GPU"):
        demo.read_scorer(demo._parser().parse_args([*words, "--devices", "6,7"]))


def test_evaluate_takes_devices_for_its_scorers(tmp_path, monkeypatch, capsys):
    words = ("--samples=x", f"--output={tmp_path}", "--scorer=a=jpeg", "--scorer=b=jpeg", "--devices=a=6,7")
    args = evaluate._parser().parse_args([*words, "--check-example=a=false", "--memory-fraction=b=0.1"])
    scorers = evaluate.read_scorers(args, [])
    assert scorers["a"].devices == ("6", "7")
    assert (scorers["a"].check_example, scorers["b"].memory_fraction) == (False, 0.1)
    monkeypatch.setattr(gpu_split, "visible_gpus", lambda _: visible_gpus(machine(tmp_path, 8)))
    assert evaluate.main([*words, "--devices=b=7"]) == 2
    assert "GPU 7 is named 2 times" in capsys.readouterr().err
