"""Gradients of devices that each have the whole weights: the same as of one device, and exchanged once.

Run as a program (`python test_whole_weights.py`), this file prints the differences for eight devices; with an argument
(`python test_whole_weights.py host:port`), what four of them add up when Gloo connects them.
"""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import ROOT, environment

from udm_grpo import mesh as meshes
from udm_grpo.batches import Samples
from udm_grpo.compile_check.hlo_collectives import collectives
from udm_grpo.grpo.loss import UDMGRPO
from udm_grpo.grpo.trajectory import TrajectoryPlan
from udm_grpo.grpo.update import accumulated_gradients, cast
from udm_grpo.model.execution import Execution, TransformerConfig
from udm_grpo.model.network import Network
from udm_grpo.model.transformer import init

CONFIG = TransformerConfig(32, 48, 2, 1, 2, 1e6, 10 + 40, 10, 40, 2)
NETWORK = Network(CONFIG, (2, 3), rows=8)
LOSS = UDMGRPO(TrajectoryPlan(10, 1.0), clip_range=0.2, kl_weight=0.05)
STATES, MICRO_BATCH = 48, 16
MESHES = {"4 data": (4, 1), "8 data": (8, 1), "8 fsdp": (1, 8), "2 data, 4 fsdp": (2, 4)}
"""Name -> numbers of devices that split the batch only, and that split the state, too."""


def samples() -> Samples:
    """Return states of which those in the last chunk, the padding, and one other have no weight."""
    rng = np.random.default_rng(3)
    draw = lambda high, width: jnp.asarray(rng.integers(0, high, (STATES, width)), jnp.int32)  # noqa: E731
    advantage, ref_logp = (jnp.asarray(rng.normal(mean, 1, STATES), jnp.float32) for mean in (0, -3))
    weight = (np.arange(STATES) % 3 != 2).astype(np.float32)
    weight[4] = 0
    return Samples(draw(10, 4), draw(40, 6), draw(40, 6), advantage, {"ref_logp": ref_logp}, jnp.asarray(weight))


def together(data: int, fsdp: int) -> tuple[Network, Any]:
    """Return the network on data x fsdp devices of this process, and their mesh."""
    mesh = meshes.make_mesh({"data": data, "fsdp": fsdp, "tensor": 1}, jax.devices()[: data * fsdp])
    execution = Execution(
        batch=meshes.over_batch(mesh), shards=meshes.batch_shards(mesh), added_up=meshes.added_up(mesh)
    )
    return replace(NETWORK, execution=execution), mesh


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


def minus(one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), one, other)


def gradients(network: Network, dtype: str, states: Samples) -> Any:
    skips = states.weight is not None
    return jax.jit(lambda p, x: accumulated_gradients(network, LOSS, cast(p, dtype), x, MICRO_BATCH, skip_empty=skips))


def compared(name: str, dtype: str, params: Any, states: Samples, exact: tuple, alone: tuple) -> dict[str, float]:
    """Return how far gradients and metrics of a mesh are from those of one device, and how they are exchanged."""
    network, mesh = together(*MESHES[name])
    placed = jax.device_put(params, meshes.replicated(mesh)), jax.device_put(states, meshes.over_batch(mesh))
    program = gradients(network, dtype, states).lower(*placed).compile()
    result, metrics = program(*placed)
    shards = jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), result)
    expected = jax.tree.map(lambda leaf, one: one.shard_shape(leaf.shape), params, meshes.shardings(mesh, params))
    return {
        "error": norm(minus(result, exact[0])) / norm(exact[0]),
        "error of one": norm(minus(alone[0], exact[0])) / norm(exact[0]),
        "metrics": norm(minus(metrics, exact[1])) / norm(exact[1]),
        "as the state": shards == expected,
        "bytes": {kind: one.bytes for kind, one in collectives(program.as_text()).items()},
    }


def differences() -> dict[str, dict[str, float]]:
    """Return the comparisons of all meshes in both dtypes; in float32, of states without weights, too."""
    params, weighted = init(CONFIG, jax.random.key(0)), samples()
    results = {}
    for states in (weighted, replace(weighted, weight=None)):
        exact = gradients(NETWORK, "float32", states)(params, states)
        for dtype in ("float32", "bfloat16") if states is weighted else ("float32",):
            alone = exact if dtype == "float32" else gradients(NETWORK, dtype, states)(params, states)
            for name in MESHES if states is weighted else ("8 fsdp",):
                label = f"{name}, {dtype}" + ("" if states is weighted else ", no weights")
                results[label] = compared(name, dtype, params, states, exact, alone)
    return results


@pytest.fixture(name="measured", scope="module")
def fixture_measured() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=environment(8, quickly=False),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_they_are_those_of_one_device(measured: dict[str, dict[str, Any]]) -> None:
    assert len(measured) == 2 * len(MESHES) + 1
    for name, each in measured.items():
        if "float32" in name:
            assert max(each["error"], each["metrics"]) < 1e-5, name
        else:
            assert each["error"] < 1.2 * each["error of one"], name


def test_they_are_exchanged_once_and_lie_where_the_state_does(measured: dict[str, dict[str, Any]]) -> None:
    """The sum over a part of the state takes a reduce-scatter; its results of 2 x 4 devices are then added up, too."""
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(init(CONFIG, jax.random.key(0))))
    for name, each in measured.items():
        assert each["as the state"], name
        moved, split = each["bytes"], "fsdp" in name
        assert set(moved) == ({"reduce-scatter", "all-reduce"} if split else {"all-reduce"}), name
        assert whole <= sum(moved.values()) < (1.3 if "2 data" in name else 1.02) * whole, name
        if split:
            assert moved["reduce-scatter"] > 0.9 * whole, name


def wrong_sums(address: str) -> dict[str, Any]:
    """Add up whole numbers, whose float32 sums are exact, on four devices that Gloo connects: how many are wrong?"""
    jax.distributed.initialize(address, 1, 0)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, jax.devices()[:4])
    numbers = np.random.default_rng(0).integers(-1000, 1000, (4, 8, 1024, 1024)).astype(np.float32)
    name = "layers/attn/q/kernel"
    add = meshes.added_up(mesh)(lambda _, own: ({name: own[0]}, {}), {name: numbers[0]})
    program = jax.jit(add).lower({}, jax.device_put(numbers, meshes.over_batch(mesh))).compile()
    wrong = 0
    for _ in range(4):
        sums, _ = program({}, jax.device_put(numbers, meshes.over_batch(mesh)))
        summed = sums[name]
        wrong += int(np.sum(np.asarray(summed) != numbers.sum(0)))
    kinds = [*collectives(program.as_text())]
    return {"wrong": wrong, "split": not summed.sharding.is_fully_replicated, "kinds": kinds}


def test_gloo_adds_up_rightly() -> None:
    """Its reduce-scatter returns wrong numbers at the end of some parts of 2 MiB and more, without an error."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    done = subprocess.run(
        [sys.executable, __file__, f"127.0.0.1:{port}"],
        cwd=ROOT,
        env=environment(4, quickly=False),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"wrong": 0, "split": True, "kinds": ["all-reduce"]}


if __name__ == "__main__":
    print(json.dumps(wrong_sums(*sys.argv[1:]) if sys.argv[1:] else differences()))
