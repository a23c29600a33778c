"""Tests of minibatches of a rollout whose states are spread over several devices."""

import subprocess
import sys

from running import ROOT, environment

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from udm_grpo import mesh as meshes
from udm_grpo.batches import Samples
from udm_grpo.grpo.minibatches import of_images, split_images
from udm_grpo.model.execution import Execution

devices = len(jax.devices())
mesh = meshes.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
over_batch = meshes.over_batch(mesh)
B, K, M = 6, 4, 3
S = -(-B * K // devices) * devices
rows = -(-B * K // M // devices) * devices
states = np.arange(S)
samples = Samples(
    prompt_ids=states[:, None] * 10 + np.arange(3), noisy=states[:, None] * 7 + np.arange(5),
    action=states[:, None] * 3 + np.arange(5), advantage=states + 0.5,
    frozen={"ref_logp": -1.0 * states, "old_logp": -2.0 * states}, weight=(states < B * K) * 1.0,
)
spread = jax.tree.map(lambda leaf: jax.device_put(jnp.asarray(leaf), over_batch), samples)
parts = np.asarray(split_images(jax.random.key(5), B, M))
execution = Execution(batch=over_batch)
step = jax.jit(lambda x, i: jax.tree.map(execution.spread, of_images(x, i, B, B * K, rows)))
for chosen in parts:
    part = step(spread, jax.device_put(chosen, meshes.replicated(mesh)))
    index = np.concatenate([k * B + chosen for k in range(K)])
    arrays = lambda x: {**x.frozen, "prompts": x.prompt_ids, "x": x.noisy, "y": x.action, "A": x.advantage}
    for name, array in arrays(part).items():
        assert array.shape[0] == rows and len(array.sharding.device_set) == devices, name
        np.testing.assert_array_equal(np.asarray(array)[: len(index)], arrays(samples)[name][index], err_msg=name)
    weight = np.ones(rows) if part.weight is None else np.asarray(part.weight)
    np.testing.assert_array_equal(weight, np.arange(rows) < len(index))
print(parts.tolist())
"""


def test_the_parts_are_the_same_on_any_number_of_devices() -> None:
    outputs = set()
    for devices in (1, 7):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment(devices), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
