"""How parameters are sharded on meshes that divide them and on others, and the notes about those that stay whole."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import geneval
from udm_grpo import mesh as meshes
from udm_grpo.batches import Params
from udm_grpo.compile_check.programs import read_sizes
from udm_grpo.lifecycle.start_notes import start_notes
from udm_grpo.mesh import MeshError
from udm_grpo.model import transformer

BLOCKS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    """Return a mesh that repeats one device, which suffices to find out how a leaf would be sharded."""
    grid = np.asarray(jax.devices()[:1] * (data * fsdp * tensor), dtype=object).reshape(data, fsdp, tensor)
    return Mesh(grid, meshes.AXES)


PUBLISHED = read_sizes("models/URSA-1.7B-IBQ512").transformer


@pytest.fixture(scope="module")
def published() -> Params:
    return transformer.abstract(PUBLISHED)


def specs(params: Params, mesh: Mesh) -> dict[str, tuple]:
    leaves = jax.tree.leaves_with_path(meshes.shardings(mesh, params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(one.spec) for path, one in leaves}


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (8, 1, 1), (1, 32, 1)])
def test_where_the_sizes_divide_the_rules_hold_as_they_stand(published, shape):
    layout = specs(published, mesh_of(*shape))
    assert layout["embed/embedding"] == ("tensor", "fsdp")
    assert layout["lm_head/kernel"] == ("fsdp", "tensor")
    for name in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"):
        assert layout[f"layers/{name}/kernel"] == (None, "fsdp", "tensor")
    for name in ("attn/o", "mlp/down"):
        assert layout[f"layers/{name}/kernel"] == (None, "tensor", "fsdp")
    assert meshes.undivided(mesh_of(*shape), published) == []


def test_seven_devices_split_the_layers(published):
    """7 divides neither width nor codes, but the 28 layers, so no block is whole on a device."""
    mesh = mesh_of(1, 7, 1)
    layout = specs(published, mesh)
    assert all(layout[f"layers/{name}/kernel"][0] == "fsdp" for name in BLOCKS)
    left = meshes.undivided(mesh, published)
    assert [(one.path, one.dividing) for one in left] == [
        ("embed/embedding", (2, 3, 4, 8)),
        ("lm_head/kernel", (2, 4, 8)),
    ]
    assert [one.numbers for one in left] == [282741 * 2048, 2048 * 131072]


def test_layers_come_together_once_and_only_where_they_are_split():
    blocks = {"attn": {"q": {"kernel": jax.numpy.ones((7, 6, 5))}}, "input_norm": {"scale": jax.numpy.ones((7, 6))}}

    def program(mesh: Mesh) -> str:
        return str(jax.make_jaxpr(meshes.LayersTogether(mesh))(blocks))

    assert program(mesh_of(1, 7, 1)).count("sharding_constraint") == 1
    assert "sharding_constraint" not in program(mesh_of(1, 3, 5))


def test_another_dimension_of_the_matrix_comes_before_the_layers(published):
    layout = specs(published, mesh_of(1, 6, 1))
    for name in ("gate", "up"):
        assert layout[f"layers/mlp/{name}/kernel"] == (None, None, ("tensor", "fsdp"))
    assert layout["layers/mlp/down/kernel"] == (None, ("tensor", "fsdp"), None)


def test_a_dimension_can_be_split_over_two_axes(published):
    """The embedding has an odd number of rows, so its width is split over both axes."""
    layout = specs(published, mesh_of(1, 4, 2))
    assert layout["embed/embedding"] == (None, ("fsdp", "tensor"))


def test_every_leaf_is_divided_evenly(published):
    for shape in ((1, 7, 1), (1, 6, 1), (1, 28, 1), (1, 4, 7), (3, 2, 2), (1, 5, 3)):
        mesh = mesh_of(*shape)
        for path, one in specs(published, mesh).items():
            leaf = published
            for key in path.split("/"):
                leaf = leaf[key]
            for size, axes in zip(leaf.shape, one, strict=False):
                names = (axes,) if isinstance(axes, str) else axes or ()
                assert size % math.prod(mesh.shape[name] for name in names) == 0, (shape, path)


def test_what_stays_whole_is_named_with_its_cost_and_what_divides_it(published):
    config = geneval.get_config()
    assert len(start_notes(config, PUBLISHED, published, mesh_of(1, 8, 1))) == 1  # the attention kernel alone
    attention, batches, *left = start_notes(config, PUBLISHED, published, mesh_of(1, 7, 1))
    assert attention == "attention: xla (there is no kernel for cpu)"
    assert "28 images of a rollout, 35 states of an update and 28 images of an evaluation at a time" in batches
    assert "draws 140 images for 128 and trains on 385 states for 384" in batches
    assert left == [
        "embed/embedding [282741, 2048] stays whole on every device, 8.63 GiB with moments and gradients: mesh.fsdp=7 "
        "divides none of its dimensions. mesh.fsdp=2, 3, 4, 8 would; of these, none fits 7 devices.",
        "lm_head/kernel [2048, 131072] stays whole on every device, 4.00 GiB with moments and gradients: mesh.fsdp=7 "
        "divides none of its dimensions. mesh.fsdp=2, 4, 8 would; of these, none fits 7 devices.",
    ]
    head = start_notes(config, PUBLISHED, published, mesh_of(1, 28, 1))[-1]
    assert head.endswith("mesh.fsdp=2, 4, 8, 16 would; of these, 2, 4 with mesh.data=-1 fits 28 devices.")
    config.optimizer.ema_decay = 0.9
    assert "5.00 GiB with" in start_notes(config, PUBLISHED, published, mesh_of(1, 7, 1))[-1]


def test_of_an_adapter_run_the_frozen_model_is_named(published):
    config = geneval.get_config()
    config.lora.rank = 8
    left = [note for note in start_notes(config, PUBLISHED, published, mesh_of(1, 7, 1)) if "stays whole" in note]
    assert len(left) == 2
    assert "lm_head/kernel [2048, 131072] stays whole on every device, 512.0 MiB of the frozen model" in left[1]


def test_small_parameters_are_not_worth_a_word():
    sizes = read_sizes("udm_grpo/assets/ursa-shapes").transformer
    tiny, mesh = transformer.abstract(sizes), mesh_of(1, 7, 1)
    assert meshes.undivided(mesh, tiny)
    assert not [note for note in start_notes(geneval.get_config(), sizes, tiny, mesh) if "stays whole" in note]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, "does not fit 7 device(s)"),
        ({"data": -1, "fsdp": 2, "tensor": 1}, "does not fit 7 device(s)"),
        ({"data": 7, "fsdp": 1, "tensor": 2}, "does not fit 7 device(s)"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes, said):
    with pytest.raises(MeshError) as error:
        meshes.make_mesh(sizes, jax.devices()[:1] * 7)
    assert said in str(error.value)
