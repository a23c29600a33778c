"""The benchmark times every stage, its PyTorch reference gives our numbers, and sizes that do not fit are refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_data import assert_close

from scripts import benchmark, benchmark_stages
from scripts import benchmark_torch as plain
from scripts.benchmark_stages import Arrays, Setting, draw_arrays, open_setting
from scripts.benchmark_versus import learner_of, model_of, torch_stages
from udm_grpo.diffusion.path import velocity
from udm_grpo.grpo.samples import judged
from udm_grpo.grpo.update import accumulated_gradients

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def opened() -> tuple[Setting, Arrays]:
    """The shapes model with few images."""
    with pytest.MonkeyPatch.context() as patch:
        original = benchmark_stages.configuration

        def small(size: str) -> Any:
            config, sizes = original(size)
            config.rollout.prompts, config.rollout.group_size, config.rollout.steps = 2, 2, 4
            return config, sizes

        patch.setattr(benchmark_stages, "configuration", small)
        setting = open_setting("shapes", rollout_batch=4, update_batch=6)
    return setting, draw_arrays(setting)


def test_pytorch_gives_the_same_log_probabilities_and_gradients(opened: tuple[Setting, Arrays]) -> None:
    setting, arrays = opened
    samples = arrays.samples
    network, objective = setting.steps.plans.network, setting.steps.plans.objective
    learner = learner_of(setting, arrays)
    metrics = learner.gradients()
    states = [learner.samples[name] for name in ("prompt_ids", "noisy", "action")]
    with torch.no_grad():
        logp = learner.model.token_mean_logp(*states, 4)
    assert_close(logp.numpy(), np.asarray(samples.frozen["ref_logp"]), 1e-5)
    whole = judged(objective, setting.steps.sizes, samples, arrays.score)
    gradients, expected = jax.jit(
        lambda params, x: accumulated_gradients(network, objective, params, x, setting.steps.sizes.update)
    )(arrays.policy, whole)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-3, abs=1e-6)
    for name in ("lm_head", "embed"):
        leaf = next(iter(learner.model.params[name].values()))
        assert_close(leaf.grad.numpy(), np.asarray(next(iter(gradients[name].values()))), 1e-3)


def test_pytorch_gives_the_same_pictures_and_velocities(opened: tuple[Setting, Arrays]) -> None:
    setting, arrays = opened
    ids = np.asarray(arrays.clean).reshape(-1, *setting.steps.plans.network.grid)
    pixels = plain.decode(plain.tensors(jax.device_get(arrays.tokenizer)), plain.tensors(ids)).numpy()
    shown = np.rint(np.clip((pixels + 1) / 2, 0, 1) * 255).astype(int)
    assert np.abs(shown - np.asarray(setting.steps.decode(arrays.tokenizer, arrays.clean)).astype(int)).max() <= 1
    z, x_1 = np.arange(8, dtype=np.int32), np.arange(100, 108, dtype=np.int32)
    every = np.ones(8, np.float32)
    expected = velocity(setting.path, *(jnp.asarray(x) for x in (z, x_1, 3 * every, 2 * every)))
    codebook = torch.from_numpy(np.array(setting.path.codebook))
    result = plain.velocity(codebook, plain.tensors(z), plain.tensors(x_1), 3.0, 2.0)
    assert_close(result.numpy(), np.asarray(expected), 1e-4)


def test_every_stage_of_pytorch_runs(opened: tuple[Setting, Arrays]) -> None:
    setting, arrays = opened
    runs = torch_stages(setting, arrays)
    assert runs.keys() == set(benchmark.NAMES) - {"scoring"}
    clean = runs["rollout"]()
    assert clean.shape == arrays.clean[:4].shape
    assert 0 <= int(clean.min()) <= int(clean.max()) < setting.path.codes
    assert model_of(setting, arrays).features(*plain.tensors([arrays.prompt_ids, arrays.clean])).isfinite().all()
    assert float(runs["iteration"]()["grad_norm"]) > 0


def test_the_command_times_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    original, file = benchmark_stages.configuration, tmp_path / "report.json"

    def small(size: str) -> Any:
        config, sizes = original(size)
        config.rollout.prompts, config.rollout.group_size, config.rollout.steps = 2, 2, 4
        return config, sizes

    monkeypatch.setattr(benchmark_stages, "configuration", small)
    monkeypatch.setattr(benchmark, "CEILING_SIDE", {"cpu": 64})
    monkeypatch.setattr(benchmark, "MAX_CALLS", 3)
    words = ["--size", "shapes", "--rollout-batch", "4", "--update-batch", "6", "--output", str(file)]
    assert benchmark.main(words) == 0
    report = json.loads(file.read_text())
    assert [one["stage"] for one in report["stages"]] == list(benchmark.NAMES)
    assert all(
        one["quartiles"][0] <= one["seconds"] <= one["quartiles"][1] and one["calls"] == 3 for one in report["stages"]
    )
    assert {one["stage"] for one in report["stages"] if "tflops_a_device" in one} >= {"forward", "rollout", "update"}
    assert "| update | " in capsys.readouterr().out


def test_stages_without_time_are_named(
    opened: tuple[Setting, Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(benchmark, "open_setting", lambda *_: opened[0])
    monkeypatch.setattr(benchmark, "draw_arrays", lambda _: opened[1])
    monkeypatch.setattr(benchmark, "CEILING_SIDE", {"cpu": 64})
    file = tmp_path / "report.json"
    assert benchmark.main(["--minutes", "0", "--stages", "forward,update", "--output", str(file)]) == 0
    assert "skipped for lack of time: forward, update" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert (report["stages"], report["left_out"]) == ([], ["forward", "update"])


def test_what_does_not_fit_is_refused_with_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(benchmark_stages, "memory_of_a_device", lambda: 20 * 2**30)
    assert benchmark.main(["--size", "1.7b"]) == 2
    said = capsys.readouterr().err
    assert "--size 1.7b needs 50.4 GiB on every device (25.2 master weights and moments + 8.4 gradients + 16.8" in said
    assert "and a device has 20.0; choose a smaller size or more devices" in said


def test_an_unknown_stage_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        benchmark.main(["--stages", "rollout,training"])
    assert "--stages: unknown stage training; choose from sampler,forward," in capsys.readouterr().err
