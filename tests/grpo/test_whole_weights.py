"""Gradients of devices that each have the whole weights: the same as of one device, and exchanged once.

Run as a program (`python test_whole_weights.py`), this file prints the differences for the devices of its process.
"""

import json
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


def samples() -> Samples:
    """Return states of which those in the last chunk, the padding, and one other have no weight."""
    rng = np.random.default_rng(3)
    draw = lambda high, width: jnp.asarray(rng.integers(0, high, (STATES, width)), jnp.int32)  # noqa: E731
    advantage, ref_logp = (jnp.asarray(rng.normal(mean, 1, STATES), jnp.float32) for mean in (0, -3))
    weight = (np.arange(STATES) % 3 != 2).astype(np.float32)
    weight[4] = 0
    return Samples(draw(10, 4), draw(40, 6), draw(40, 6), advantage, {"ref_logp": ref_logp}, jnp.asarray(weight))


def together() -> tuple[Network, Any]:
    """Return the network on all devices of this process, and its mesh."""
    mesh = meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    execution = Execution(
        batch=meshes.over_batch(mesh),
        head=meshes.head(mesh),
        shards=meshes.batch_shards(mesh),
        added_up=meshes.added_up(mesh),
    )
    return replace(NETWORK, execution=execution), mesh


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


def differences(dtype: str, weighted: bool) -> dict[str, float]:
    """Return how far the gradients and metrics of all devices are from those of one in float32, and the exchanges."""
    network, mesh = together()
    params, states = init(CONFIG, jax.random.key(0)), samples()
    states = states if weighted else replace(states, weight=None)

    def gradients(network: Network, dtype: str) -> Any:
        return jax.jit(
            lambda p, x: accumulated_gradients(network, LOSS, cast(p, dtype), x, MICRO_BATCH, skip_empty=weighted)
        )

    exact, exact_metrics = gradients(NETWORK, "float32")(params, states)
    alone, _ = gradients(NETWORK, dtype)(params, states)
    placed = jax.device_put(params, meshes.replicated(mesh)), jax.device_put(states, meshes.over_batch(mesh))
    program = gradients(network, dtype).lower(*placed).compile()
    result, metrics = program(*placed)
    minus = lambda one, other: norm(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), one, other))  # noqa: E731
    return {
        "error": minus(result, exact) / norm(exact),
        "error of one": minus(alone, exact) / norm(exact),
        "metrics": minus(metrics, exact_metrics) / norm(exact_metrics),
        "bytes": sum(one.bytes for one in collectives(program.as_text()).values()),
        "bytes of the gradients": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    }


@pytest.fixture(name="measured", scope="module", params=[4, 8])
def fixture_measured(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=environment(request.param, quickly=False),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("weights", ["weighted", "unweighted"])
def test_they_are_those_of_one_device(measured: dict[str, dict[str, float]], weights: str) -> None:
    assert measured[f"float32 {weights}"]["error"] < 1e-5
    assert measured[f"float32 {weights}"]["metrics"] < 1e-5
    of_16_bits = measured[f"bfloat16 {weights}"]
    assert of_16_bits["error"] < 1.2 * of_16_bits["error of one"]


def test_they_are_exchanged_once(measured: dict[str, dict[str, float]]) -> None:
    for each in measured.values():
        assert each["bytes of the gradients"] <= each["bytes"] < each["bytes of the gradients"] + 1024


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{dtype} {'weighted' if weighted else 'unweighted'}": differences(dtype, weighted)
                for dtype in ("float32", "bfloat16")
                for weighted in (True, False)
            }
        )
    )
