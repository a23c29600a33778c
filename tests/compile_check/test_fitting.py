"""What a configuration leaves to the memory of its devices is settled by what the compiler says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from udm_grpo.compile_check.fitting import NAMES, PROGRAMS, SHARE, settings_of, settled, with_settings
from udm_grpo.compile_check.measure import Report
from udm_grpo.config import RunConfig

GIB = 2**30
LIMIT = 16 / SHARE
"""So that 16 GiB are used at most."""


class Mesh:
    """A mesh of sixteen devices, of which `fsdp` share the state."""

    size = 16

    def __init__(self, fsdp: int = 16, tensor: int = 1):
        self.shape = {"data": 16 // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}


class FakeCompiler:
    """Says what a program needs by a function of its configuration and name, in GiB."""

    def __init__(self, need: Callable[[RunConfig, str], float], mesh: Any = None, limit: float | None = LIMIT):
        self.need, self.mesh, self.limit = need, mesh or Mesh(), limit and round(limit * GIB + 1)
        self.devices = [type("Device", (), {"device_kind": "chip"})]
        self.asked: list[tuple[str, list[Any]]] = []

    def __call__(self, config: RunConfig, name: str) -> Report:
        self.asked.append((name, settings_of(config)))
        size = config.rollout.micro_batch if name in PROGRAMS[:2] else config.optimizer.micro_batch
        return Report(name, size, 1, int(self.need(config, name) * GIB) - 1, 0, 0, self.limit, flops=1, repeated=1)


def config_with(weights: str = "auto", remat: str = "auto", rollout: int = 32, update: int = 32) -> RunConfig:
    """Return a run of 128 images and 384 states."""
    return with_settings(RunConfig(), (weights, remat, rollout, update))


def weights_and_remat(replicated: float, dots: float, full: float) -> Callable[[RunConfig, str], float]:
    """Return a need of 10 GiB, more for replicated copies, less for recomputation; only the update needs that much."""

    def need(config: RunConfig, name: str) -> float:
        if name != "update":
            return 1
        saved = {"none": 0, "dots": dots, "full": full}[config.model.remat]
        return 10 + (replicated if config.model.compute_weights == "replicated" else 0) - saved

    return need


@pytest.mark.parametrize(
    ("replicated", "dots", "full", "expected"),
    [
        (6, 1, 2, ["replicated", "none"]),
        (7, 1, 2, ["replicated", "dots"]),
        (8, 1, 2, ["replicated", "full"]),
        (9, 1, 2, ["sharded", "none"]),
    ],
)
def test_whole_copies_come_first_and_then_little_recomputation(replicated, dots, full, expected):
    config, notes = settled(config_with(), FakeCompiler(weights_and_remat(replicated, dots, full)))
    assert settings_of(config) == [*expected, 32, 32]
    assert notes[-1].startswith(f"model.compute_weights={expected[0]}, model.remat={expected[1]}: update needs ")
    assert notes[-1].endswith("of 16.84 GiB on each device, by the compiler")
    rejected = expected != ["replicated", "none"]
    assert rejected == any("model.remat=none does not fit: update needs" in note for note in notes)


def test_a_setting_that_is_given_stays():
    need = weights_and_remat(9, 1, 2)
    assert settings_of(settled(config_with("replicated", "auto"), FakeCompiler(need))[0])[0] == "replicated"
    assert settings_of(settled(config_with("auto", "full"), FakeCompiler(weights_and_remat(0, 1, 2)))[0])[1] == "full"
    compiler = FakeCompiler(need)
    fixed = config_with("sharded", "dots")
    assert settled(fixed, compiler) == (fixed, [])
    assert compiler.asked == []


def test_any_program_can_be_the_one_that_does_not_fit():
    def need(config: RunConfig, name: str) -> float:
        return 20 if name == "decode" and config.model.compute_weights == "replicated" else 1

    config, notes = settled(config_with(remat="none"), FakeCompiler(need))
    assert config.model.compute_weights == "sharded"
    assert "does not fit: decode needs 20.00 of 16.84 GiB" in notes[0]


def test_if_nothing_fits_the_smallest_is_taken_and_it_is_said():
    config, notes = settled(config_with(), FakeCompiler(lambda config, name: 17))
    assert settings_of(config)[:2] == ["sharded", "full"]
    assert notes[-1].startswith("warning: nothing fits")
    assert len(notes) == 7


@pytest.mark.parametrize(("per_row", "rollout", "update"), [(0.001, 32, 384), (0.1, 32, 128), (0.6, 16, 16)])
def test_micro_batches_are_as_large_as_fits(per_row, rollout, update):
    """A rollout has at least four parts, so that the first images are scored while others are drawn."""

    def need(config: RunConfig, name: str) -> float:
        return 1 + per_row * (config.rollout.micro_batch if name in PROGRAMS[:2] else config.optimizer.micro_batch)

    config, _ = settled(config_with("sharded", "none", 0, 0), FakeCompiler(need))
    assert settings_of(config)[2:] == [rollout, update]


def test_the_programs_that_share_a_micro_batch_all_fit():
    def need(config: RunConfig, name: str) -> float:
        return 1 + config.optimizer.micro_batch / 16 if name == "reference" else 1

    config, _ = settled(config_with("sharded", "none", 32, 0), FakeCompiler(need))
    assert config.optimizer.micro_batch == 192


def test_where_memory_is_unknown_nothing_is_compiled():
    compiler = FakeCompiler(lambda config, name: 1, limit=None)
    config, notes = settled(config_with(rollout=0, update=0), compiler)
    assert settings_of(config) == ["replicated", "none", 32, 32]
    assert notes[0].startswith(
        ", ".join(f"{name}={value}" for name, value in zip(NAMES, settings_of(config), strict=True))
    )
    assert "the memory of a chip device is not known" in notes[0]
    assert compiler.asked == []


def test_copies_are_whole_anyway_or_split_with_the_layers():
    fits = lambda config, name: 1  # noqa: E731
    assert settled(config_with(remat="none"), FakeCompiler(fits, Mesh(fsdp=1)))[1] == []
    config, _ = settled(config_with(remat="none"), FakeCompiler(fits, Mesh(fsdp=2, tensor=8)))
    assert config.model.compute_weights == "sharded"


def test_settings_go_back_into_a_configuration():
    config = config_with("sharded", "dots", 3, 5)
    assert with_settings(RunConfig(), settings_of(config)) == config
    assert replace(config, seed=1) != config
