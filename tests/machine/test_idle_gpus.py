"""The warning on a machine with NVIDIA GPUs where JAX knows only the CPU."""

from importlib.metadata import version

import pytest

from udm_grpo import train
from udm_grpo.machine import idle_gpus as module
from udm_grpo.machine.idle_gpus import idle_gpus

LISTED = """\
0, GPU-1, 81559, NVIDIA H100 80GB HBM3
1, GPU-2, 81559, NVIDIA H100 80GB HBM3
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Simulate a machine without GPUs."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "dev").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(module, "DRIVER", tmp_path / "gpus")
    return tmp_path


def nvidia_smi(folder, status: int = 0) -> None:
    path = folder / "bin" / "nvidia-smi"
    path.write_text(f"#!/bin/sh\necho '{LISTED.strip()}'\nexit {status}\n")
    path.chmod(0o755)


def test_gpus_that_nvidia_smi_lists_are_named_with_what_to_install(machine):
    nvidia_smi(machine)
    said = idle_gpus("cpu")
    assert "2 NVIDIA GPU(s) (NVIDIA H100 80GB HBM3)" in said
    assert f'pip install "jax[cuda13]=={version("jax")}"' in said
    assert idle_gpus("gpu") is None
    assert idle_gpus("tpu") is None


def test_a_plugin_that_does_not_work_is_another_matter(machine, monkeypatch):
    nvidia_smi(machine)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin" or None)
    assert "driver 580" in idle_gpus("cpu")
    assert "pip install" not in idle_gpus("cpu")


@pytest.mark.parametrize("file", ["dev/nvidia0", "gpus/0000:1b:00.0"])
def test_without_nvidia_smi_the_driver_s_files_tell(machine, file):
    assert idle_gpus("cpu") is None
    (machine / file).parent.mkdir(exist_ok=True)
    (machine / file).touch()
    assert f"1 NVIDIA GPU(s) ({file.partition('/')[2]})" in idle_gpus("cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_PLATFORMS", "cpu"), *(("CUDA_VISIBLE_DEVICES", hidden) for hidden in ("", "-1", "-1,0", "NoDevFiles"))],
)
def test_nobody_is_told_who_chose_the_cpu(machine, monkeypatch, name, value):
    nvidia_smi(machine)
    assert idle_gpus("cpu")
    monkeypatch.setenv(name, value)
    assert idle_gpus("cpu") is None


def test_an_nvidia_smi_without_a_driver_counts_no_gpus(machine):
    nvidia_smi(machine, status=9)
    assert idle_gpus("cpu") is None


def test_training_says_so_at_the_start(machine, monkeypatch, capsys):
    nvidia_smi(machine)
    assert train.main(["--config=configs/shapes.py:smoke", f"--config.model.path={machine}/none"]) == 2
    warning, *rest = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: This machine has 2 NVIDIA GPU(s)")
    assert rest[0].startswith("error: ")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert train.main(["--config=configs/shapes.py:smoke", f"--config.model.path={machine}/none"]) == 2
    assert "warning" not in capsys.readouterr().err
