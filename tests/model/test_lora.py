"""Tests of low-rank adapters: their numbers, their memory, and complete runs that train one."""

import dataclasses
import gc
import json
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import assert_close
from running import ROOT, SMOKE, metrics, train
from safetensors.numpy import load_file
from small_model import CONFIG, LOSS, NETWORK, random_samples

import udm_grpo.run
import udm_grpo.train
from udm_grpo import convert, sample
from udm_grpo.batches import Params, TrainState
from udm_grpo.checkpoints.checkpoint import CheckpointError, Checkpoints
from udm_grpo.checkpoints.trained import open_training
from udm_grpo.config import ConfigError, LoraConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.export import start_weights, unrounded
from udm_grpo.grpo.update import EmaPlan, accumulated_gradients, cast, update
from udm_grpo.model import lora
from udm_grpo.model.execution import Execution, TransformerConfig
from udm_grpo.model.network import Network
from udm_grpo.model.transformer import hidden_states, init
from udm_grpo.released.peft_files import merge_on_host
from udm_grpo.released.weights import load_folder
from udm_grpo.scoring.sample_settings import digest_of
from udm_grpo.tensor_files.weight_table import leaves_by_path

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SHAPES = ROOT / "udm_grpo" / "assets" / "ursa-shapes"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
RUN = (
    *("iterations=3", "lora.rank=3", "lora.alpha=12.0", "optimizer.ema_decay=0.5", "optimizer.learning_rate=0.01"),
    *("optimizer.schedule=constant", "optimizer.warmup_updates=0", "evaluation.every=0", "evaluation.picture_every=0"),
    *("evaluation.final_prompts=2", "evaluation.picture_prompts=1", "evaluation.batch=8", "evaluation.steps=(4,)"),
    *("rollout.micro_batch=16", "rollout.steps=4", "grpo.window_starts=1", "checkpoint.every=1", "checkpoint.keep=3"),
    "optimizer.micro_batch=48",
)


def drawn(adapter: Params, size: float = 0.1) -> Params:
    """Return an adapter of random numbers, with B not zero."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, size, leaf.shape), jnp.float32), adapter)


def hidden(params: Params) -> jax.Array:
    samples = random_samples()
    return hidden_states(CONFIG, params, samples.prompt_ids, samples.noisy, NETWORK.grid)


@pytest.mark.parametrize("patterns", [("*_proj",), ("q_proj", "down_proj")])
def test_an_adapter_computes_what_the_merged_weights_do(patterns: tuple[str, ...]) -> None:
    base = init(CONFIG, jax.random.key(0))
    fresh = lora.init(lora.abstract(CONFIG, 3, lora.targets(patterns)), jax.random.key(1))
    assert {name.split("/")[2] for name in leaves_by_path(fresh)} == {
        name.removesuffix("_proj") for name in lora.targets(patterns)
    }
    plain = hidden(base)
    assert not any(np.any(leaf) for path, leaf in leaves_by_path(fresh).items() if path.endswith("lora_b"))
    assert_close(hidden(lora.attach(base, fresh)), np.asarray(plain), 1e-6)  # another program rounds differently
    adapter = drawn(fresh)
    merged = merge_on_host(base, adapter, 0.5)
    assert_close(hidden(lora.attach(base, lora.scaled(adapter, 0.5))), np.asarray(hidden(merged)))
    assert float(jnp.abs(hidden(merged) - plain).max()) > 0.1
    kernels = [tree["layers"]["attn"]["q"]["kernel"][1] for tree in (merged, base)]
    both = adapter["layers"]["attn"]["q"]
    expected = np.asarray(kernels[1], np.float64) + 0.5 * np.float64(both["lora_a"][1]) @ np.float64(both["lora_b"][1])
    np.testing.assert_allclose(kernels[0], expected, rtol=0, atol=1e-6)
    untouched = leaves_by_path(merged).keys() - {
        f"layers/{'/'.join(lora.MAPS[n])}/kernel" for n in lora.targets(patterns)
    }
    for path in untouched:
        np.testing.assert_array_equal(leaves_by_path(merged)[path], leaves_by_path(base)[path])


def test_gradients_follow_the_chain_rule() -> None:
    """If W' = W + c A B and G is the gradient of W', then that of A is c G B^T and that of B is c A^T G."""
    base, samples, c = init(CONFIG, jax.random.key(0)), random_samples(), 4.0
    adapter = drawn(lora.abstract(CONFIG, 3, lora.targets(("*_proj",))))
    merged = jax.tree.map(jnp.asarray, merge_on_host(base, adapter, c))
    again = dataclasses.replace(NETWORK, execution=Execution(remat="full"))
    whole, expected_metrics = accumulated_gradients(NETWORK, LOSS, merged, samples, 4)
    optimizer = optax.sgd(1.0)
    state = TrainState(adapter, optimizer.init(adapter), adapter, jnp.int32(0))
    policy = lora.attach(base, lora.scaled(adapter, c))
    after, step_metrics = update(again, LOSS, optimizer, EmaPlan(0.75), 2, state, policy, samples, c)
    for part, name in lora.MAPS.values():
        G, both = whole["layers"][part][name]["kernel"], adapter["layers"][part][name]
        moved = after.params["layers"][part][name]
        transposed = jnp.swapaxes(both["lora_a"], 1, 2), jnp.swapaxes(both["lora_b"], 1, 2)
        assert_close(both["lora_a"] - moved["lora_a"], np.asarray(c * G @ transposed[1]), 2e-4)
        assert_close(both["lora_b"] - moved["lora_b"], np.asarray(c * transposed[0] @ G), 2e-4)
    np.testing.assert_allclose(step_metrics["loss"], expected_metrics["loss"], rtol=1e-4, atol=1e-6)
    # The same in bfloat16, with a rounded base and exact adapters.
    policy = cast(policy, jnp.bfloat16)
    narrow, _ = update(again, LOSS, optimizer, EmaPlan(0.75), 2, state, policy, samples, c)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.params))
    moved, exactly = (
        np.concatenate(
            [np.ravel(new - old) for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(adapter), strict=True)]
        )
        for params in (narrow.params, after.params)
    )
    assert np.corrcoef(moved, exactly)[0, 1] > 0.99
    average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, adapter, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.ema, average)


def test_an_update_makes_nothing_of_the_bases_size() -> None:
    """There are neither gradients nor copies of the frozen weights, including the head's."""
    config = TransformerConfig(64, 96, 1, 1, 2, 1e6, 8202, 10, 8192, 2)
    base = init(config, jax.random.key(0))
    adapter = lora.init(lora.abstract(config, 2, lora.targets(("*_proj",))), jax.random.key(1))
    optimizer = optax.adam(1e-3)

    def memory(trained: Params, policy: Params, factor: float | None) -> tuple[int, int]:
        state = TrainState(trained, optimizer.init(trained), trained, jnp.int32(0))
        network = Network(config, NETWORK.grid, rows=1)
        step = jax.jit(
            lambda s, p, x: update(network, LOSS, optimizer, EmaPlan(0.9), 2, s, p, x, factor),
            donate_argnums=0,
        )
        analysis = step.lower(state, policy, random_samples()).compile().memory_analysis()
        return analysis.temp_size_in_bytes, analysis.output_size_in_bytes

    head = base["lm_head"]["kernel"].nbytes
    temporary, kept = memory(base, base, None)
    assert min(temporary, kept) > 2 * head  # a gradient and a state of that size
    temporary, kept = memory(adapter, lora.attach(base, adapter), 2.0)
    assert temporary < 0.8 * head  # some arrays of an image's logits, each of size head / 11
    assert kept < 0.2 * head


def test_patterns_and_ranks_that_cannot_be() -> None:
    assert lora.targets(("?_proj", "up_proj")) == ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")
    with pytest.raises(ValueError, match=r"'attn', 'Q_proj' matches nothing; choose from q_proj, k_proj, .*\*_proj"):
        lora.targets(("q_proj", "attn", "Q_proj"))
    with pytest.raises(ValueError, match="it is empty; choose from q_proj"):
        lora.targets(())
    with pytest.raises(ValueError, match=r"the rank is 33, more than .* of q_proj is 32 x 256; choose a lower one"):
        lora.abstract(TransformerConfig(32, 48, 2, 1, 2, 1e6, 30, 10, 20, 2), 33, ("q_proj",))


def live() -> Counter:
    """Return the number of buffers that hold arrays of each shape; on CPU several arrays may share one."""
    gc.collect()
    places = {(leaf.shape, leaf.unsafe_buffer_pointer()) for leaf in jax.live_arrays()}
    return Counter(shape for shape, _ in places)


class Runs:
    """Runs in this process that share their compiled stages; the live arrays after each iteration are recorded."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.live: list[tuple[Params, Counter]] = []
        build, look, stages = udm_grpo.run.build, udm_grpo.train.look, []

        def build_once(*args):
            stages.append(stages[0] if stages else build(*args))
            return stages[-1]

        def look_at(run, reports, state, reference, position):
            self.live.append((reference, live()))
            return look(run, reports, state, reference, position)

        patch.setattr(udm_grpo.run, "build", build_once)
        patch.setattr(udm_grpo.train, "look", look_at)

    def __call__(self, output: Path, *overrides: str) -> None:
        words = [f"--config.{word}" for word in (f"output_dir={output}", *RUN, *overrides)]
        udm_grpo.train.train(parse(["--config", str(ROOT / SMOKE), *words]))


@pytest.fixture(scope="module")
def runs():
    with pytest.MonkeyPatch.context() as patch:
        yield Runs(patch)


@pytest.fixture(scope="module")
def before() -> Counter:
    """Return the buffers in use before any run."""
    return live()


@pytest.fixture(scope="module")
def finished(before: Counter, runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "run"
    runs(output)
    return output


def test_one_copy_of_the_base_is_all_there_is(finished: Path, runs: Runs, before: Counter) -> None:
    assert len(runs.live) >= 3
    for reference, live in runs.live[:3]:
        for shape, count in Counter(leaf.shape for leaf in jax.tree.leaves(reference) if leaf.size > 10_000).items():
            assert live[shape] - before[shape] == count, shape


def test_the_first_policy_is_the_base(finished: Path) -> None:
    rows = metrics(finished)
    assert abs(rows[0]["kl"]) < 1e-12
    assert rows[-1]["kl"] > 1e-6
    state = open_training(finished / "checkpoints" / "00000001").read_part("state/params/")
    both = state["layers"]["attn"]["q"]
    assert both["lora_a"].shape == (4, 128, 3)
    assert np.abs(both["lora_b"]).max() > 0


def test_a_run_exports_merged_and_for_peft(finished: Path) -> None:
    base = load_file(SHAPES / WEIGHTS)
    for ending in ("", "_raw"):
        merged = load_file(finished / f"export{ending}" / WEIGHTS)
        adapter = load_file(finished / f"export_lora{ending}" / "adapter_model.safetensors")
        config = json.loads((finished / f"export_lora{ending}" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 12)
        assert len(adapter) == 2 * 4 * 7
        for name, tensor in merged.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            expected = base[name]
            if f"{stem}.lora_A.weight" in adapter:
                expected = expected + 4 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
                assert np.abs(tensor - base[name]).max() > 1e-4
            np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6, err_msg=name)
    average, raw = (load_file(finished / f"export{ending}" / WEIGHTS) for ending in ("", "_raw"))
    assert any((average[name] != raw[name]).any() for name in raw)


def test_a_resumed_run_ends_with_the_same_bits(finished: Path, runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "again")
    for name in ("export", "export_raw", "export_lora", "export_lora_raw", "checkpoints/00000003"):
        shutil.rmtree(tmp_path / "again" / name)
    runs(tmp_path / "again", "checkpoint.resume=latest")
    assert metrics(tmp_path / "again") == metrics(finished)
    for name in (f"export/{WEIGHTS}", f"export_raw/{WEIGHTS}", "export_lora_raw/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_does_not_go_on_with_another_adapter(finished: Path, runs: Runs, tmp_path: Path) -> None:
    resume = f"checkpoint.resume={finished}"
    with pytest.raises(CheckpointError, match=r"lora\.alpha: saved 12\.0, now 6\.0"):
        runs(tmp_path / "alpha", resume, "lora.alpha=6.0")


def test_a_rank_above_a_maps_smaller_side_is_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lora\.rank does not fit .*ursa-shapes: the rank is 200, .*of k_proj is 128 x"
    ):
        runs(tmp_path / "rank", "lora.rank=200", "lora.targets=(k_proj,v_proj)")


def call(*words: object) -> int:
    return convert.main([str(word) for word in words])


def test_a_checkpoint_becomes_what_the_run_exports(finished: Path, tmp_path: Path, capsys) -> None:
    words = ("to-pytorch", "--checkpoint", finished, "--base", SHAPES)
    for weights, ending in (("ema", ""), ("params", "_raw")):
        folder, adapter = tmp_path / f"export{ending}", tmp_path / f"export_lora{ending}"
        assert call(*words, "--weights", weights, "--output", folder) == 0
        assert call(*words, "--weights", weights, "--adapter", adapter) == 0
        for file in (folder / WEIGHTS, adapter / "adapter_model.safetensors", adapter / "adapter_config.json"):
            assert file.read_bytes() == (finished / file.relative_to(tmp_path)).read_bytes()
        assert call("verify", folder, finished, "--weights", weights) == 0
        assert call("verify", finished, folder, "--weights", weights) == 0
    assert call("verify", folder, finished, "--weights", "ema") == 1
    capsys.readouterr()
    assert call("info", finished, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["lora"] == {"rank": 3, "alpha": 12.0, "targets": ["*_proj"]}
    assert info["parts"]["reference"]["parameters"] == 857728
    assert info["parts"]["state/params"]["parameters"] == info["parts"]["state/ema"]["parameters"] < 857728 / 10


def test_pictures_are_drawn_with_an_adapter(finished: Path, tmp_path: Path, capsys) -> None:
    exported = sample.open_folder(str(finished / "export")).released
    model = sample.open_folder(str(SHAPES), str(finished / "export_lora"))
    for released in (model.released, sample.open_run(str(finished)).released):
        assert digest_of(released) == digest_of(exported)
    raw = sample.open_run(str(finished), weights="params").released
    assert digest_of(raw) == digest_of(sample.open_folder(str(finished / "export_raw")).released)
    assert model.source["adapter"] == str(finished / "export_lora")
    words = ["--prompt=a", "--height=32", "--width=32", f"--adapter={finished / 'export_lora'}"]
    assert sample.main([f"--run={finished}", f"--output={tmp_path / 'new'}", *words]) == 2
    assert "--adapter belongs to a released folder" in capsys.readouterr().err
    less = ["--steps=2", "--batch=2", "--images-per-prompt=2", f"--output={tmp_path / 'new'}"]
    assert sample.main([f"--checkpoint={SHAPES}", *words, *less]) == 0
    assert json.loads((tmp_path / "new" / "settings.json").read_text())["weights"] == digest_of(exported)


def test_the_best_adapter(finished: Path, tmp_path: Path, capsys) -> None:
    """It is saved without its base, which is read from the released folder instead."""
    training = open_training(finished)
    shutil.copy(finished / "config.json", tmp_path)
    params = training.read_part("state/ema/")
    saved, meta = Checkpoints(tmp_path / "checkpoints", keep=1), {"fingerprint": dict(training.meta["fingerprint"])}
    saved.save_best(2, {"params": params}, meta)
    exported = sample.open_folder(str(finished / "export")).released
    assert digest_of(sample.open_run(str(tmp_path), "best").released) == digest_of(exported)
    best = tmp_path / "checkpoints" / "best"
    assert call("verify", best, SHAPES) == 2
    assert "contains an adapter without its base; use to-pytorch with --base" in capsys.readouterr().err
    saved.save_best(3, {"params": params}, {})
    assert call("to-pytorch", "--checkpoint", best, "--base", SHAPES, "--output", tmp_path / "x") == 2
    assert "its meta lacks the adapter's alpha" in capsys.readouterr().err


def test_conversions_that_cannot_be(finished: Path, tmp_path: Path, capsys) -> None:
    golden = ROOT / "tests" / "golden" / "a" / "checkpoint"
    for target in ("--output", "--adapter"):
        assert call("to-pytorch", "--checkpoint", finished, "--base", golden, target, tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert "is of another model than" in said
        assert "wrong shape: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is (3, 128)" in said
    params = jax.tree.map(np.asarray, load_folder(golden).transformer)
    Checkpoints(tmp_path / "whole", keep=1).save(0, {"state": {"params": params}}, {})
    words = ("to-pytorch", "--checkpoint", tmp_path / "whole", "--base", golden)
    assert call(*words, "--adapter", tmp_path / "out") == 2
    assert "trained all weights, not an adapter; use --output" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_eight_devices_train_the_same_adapter(finished: Path, tmp_path: Path) -> None:
    """The README's command is run on a small scale."""
    sizes = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    done = train(tmp_path / "eight", *RUN, "iterations=2", *sizes, devices=8)
    assert done.returncode == 0, done.stderr
    for one, eight in zip(metrics(finished), metrics(tmp_path / "eight"), strict=False):
        assert eight["reward"] == one["reward"]
        for name in ("loss", "logp", "entropy", "grad_norm"):
            assert eight[name] == pytest.approx(one[name], rel=2e-3, abs=2e-5), name
    one, eight = (
        leaves_by_path(open_training(folder / "checkpoints" / "00000001").read_part("state/opt_state/"))
        for folder in (finished, tmp_path / "eight")
    )
    moments = [name for name in one if "/mu/" in name and name.endswith("lora_b")]
    assert len(moments) == 7
    for name in moments:
        assert_close(eight[name], one[name], 1e-4)


def test_a_rounded_base_is_taken_from_the_folder_it_came_from(tmp_path: Path) -> None:
    released = load_folder(SHAPES)
    whole = jax.tree.map(np.asarray, released.transformer)
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), whole)
    jax.tree.map(np.testing.assert_array_equal, start_weights(SHAPES, released.transformer_config, rounded), whole)
    # If the folder has changed or is gone, the values seen in training are used.
    rounded["norm"]["scale"] = rounded["norm"]["scale"] * jnp.bfloat16(2)
    weights = start_weights(SHAPES, released.transformer_config, rounded)
    np.testing.assert_array_equal(weights["norm"]["scale"], np.float32(rounded["norm"]["scale"]))
    np.testing.assert_array_equal(weights["embed"]["embedding"], whole["embed"]["embedding"])
    gone = start_weights(tmp_path, released.transformer_config, rounded)
    jax.tree.map(np.testing.assert_array_equal, gone, jax.tree.map(np.asarray, rounded))
    assert unrounded(np.float32([1.001]), np.float32([1.001]).astype(jnp.bfloat16)) == np.float32(1.001)


def test_the_factor() -> None:
    assert lora.factor(LoraConfig(rank=8, alpha=32.0)) == 4.0
