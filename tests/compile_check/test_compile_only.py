"""Compiling for devices that are not present: a small case by the TPU compiler, and the errors of impossible ones."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from golden_data import DEFAULT_ROOT
from pages import manual
from running import ROOT

from udm_grpo import train
from udm_grpo.compile_check import measure, topology
from udm_grpo.compile_check.compile_only import describe
from udm_grpo.compile_check.largest import Search, candidates, largest
from udm_grpo.compile_check.measure import Report, too_large
from udm_grpo.compile_check.programs import device_bytes, mesh_of, programs, read_sizes
from udm_grpo.config import ConfigError, RunConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not os.environ.get("UDM_GRPO_REQUIRE_LIBTPU"),
    reason=f"the TPU compiler is not installed: pip install '{topology.libtpu_series()}'",
)

CONFIG = """
from udm_grpo.config import RunConfig

def get_config():
    config = RunConfig()
    config.model.path = {path!r}
    config.model.text_length = 7
    config.model.height, config.model.width = 16, 24
    config.model.logit_rows = 1
    config.prompts.train = config.prompts.heldout = "not-there.txt"
    config.rollout.prompts, config.rollout.group_size, config.rollout.steps = 4, 4, 5
    config.rollout.micro_batch = config.optimizer.micro_batch = config.evaluation.batch = 8
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """A config of the tiny golden model; none of its other files exist."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG.format(path=str(DEFAULT_ROOT / "a" / "checkpoint")))
    return path


def run(config_file, *flags) -> int:
    return train.main(["--config", str(config_file), "--compile-only", *flags])


@needs_libtpu
def test_a_small_run_compiles_for_a_tpu_that_is_not_here(config_file, tmp_path, capsys):
    path = tmp_path / "report.json"
    kernel = ("--config.model.attention=splash", "--config.model.dtype=bfloat16", "--config.model.remat=full")
    flags = ("--topology=v5e:2x2", "--programs=rollout,update", "--no-search", f"--report={path}")
    assert run(config_file, *flags, *kernel, "--config.model.compute_weights=sharded") == 0
    said = capsys.readouterr().out
    assert "v5e:2x2: 4 x TPU v5 lite" in said
    assert "rollout, 8 at a time: fits" in said
    assert "of 15.75 GiB a device" in said
    record = json.loads(path.read_text())
    assert (record["devices"], record["kind"]) == (4, "TPU v5 lite")
    rollout, update = record["programs"]
    assert rollout["fits"]
    assert rollout["beside"] > 3 * rollout["arguments"]  # masters, moments, reference and tokenizer beside the policy
    assert update["arguments"] > 0 and update["temporaries"] > 0 and update["flops"] > rollout["flops"]  # noqa: PT018
    # Weights are spread over four devices: they have to be gathered, and gradients to be summed.
    assert rollout["collectives"]
    assert {"all-reduce", "reduce-scatter"} & set(update["collectives"])
    # No device repeats the work of another: their total work is about what is needed.
    assert rollout["repeated"] < 1.5
    assert update["repeated"] < 1.5


@needs_libtpu
def test_whole_copies_are_chosen_where_they_fit(config_file, tmp_path, capsys):
    path = tmp_path / "report.json"
    flags = ("--topology=v5e:2x2", "--programs=rollout,update", "--no-search", "--config.model.remat=none")
    assert run(config_file, *flags, f"--report={path}") == 0
    said = capsys.readouterr().out
    assert "model.compute_weights=replicated: " in said
    assert "of 15.75 GiB on each device, by the compiler" in said
    rollout, update = json.loads(path.read_text())["programs"]
    assert rollout["collectives"] == {}
    assert {"all-reduce", "reduce-scatter"} >= set(update["collectives"])
    assert update["repeated"] < 1.5


def test_the_devices_at_hand(config_file, capsys):
    assert run(config_file, "--programs=reference") == 0
    said = capsys.readouterr().out
    assert "the devices at hand: 1 x cpu" in said
    assert "no limit known" in said
    assert "a device sends or receives: nothing" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(("--topology=v9z:2x2",), "--topology=v9z:2x2: libtpu knows no such slice", marks=needs_libtpu),
        pytest.param(("--topology", "nonsense"), "name one as kind:chips, such as v5e:4x4", marks=needs_libtpu),
        (("--topology",), "--topology has no value; write --topology=value"),
        pytest.param(("--topology=v5e:2x2", "--config.mesh.fsdp=3"), "does not fit 4 device", marks=needs_libtpu),
        (("--programs=rollout,training",), "--programs: unknown training; choose from rollout,decode"),
        (("--config.model.path=models/URSA-9B",), "the package has no sizes for URSA-9B"),
        (("--config.model.height=18",), "choose multiples of 4"),
        (("--compile",), "unexpected --compile"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_a_line(config_file, flags, message, capsys):
    assert run(config_file, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_without_libtpu_the_way_out_is_named(config_file, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name))
    assert run(config_file, "--topology=v5e:2x2") == 2
    assert "pip install 'libtpu==" in capsys.readouterr().err


def report(size: int, per_size: int = 10, fixed: int = 100, limit: int | None = 1000) -> Report:
    """Return the report of a program whose memory grows by `per_size` for each image."""
    return Report("update", size, 1, fixed + per_size * size - 1, 0, 0, limit, flops=1, repeated=1)


@pytest.mark.parametrize(
    ("per_size", "largest_size", "beyond", "most_compilations"),
    [
        (10, 64, "96 would need about 1.04 GiB a device", 2),
        (1, 384, "", 2),
        (200, None, "16 need 3.22 GiB a device", 1),
        (40, 16, "32 need 1.35 GiB a device", 1),
    ],
)
def test_the_largest_micro_batch_is_found_by_few_compilations(per_size, largest_size, beyond, most_compilations):
    sizes, tried = candidates(384, 16), []
    assert sizes == [16, 32, 48, 64, 96, 128, 192, 384]

    def measured(size):
        tried.append(size)
        return mebibytes(report(size, per_size))

    def mebibytes(one: Report) -> Report:
        return dataclasses.replace(one, arguments=2**20, temporaries=one.temporaries * 2**20, limit=1000 * 2**20)

    assert largest(measured, mebibytes(report(32, per_size)), sizes) == Search(largest_size, beyond)
    assert len(tried) <= most_compilations
    assert len(set(tried)) == len(tried)


def test_devices_that_divide_no_batch_are_searched_by_what_they_work_through():
    assert candidates(16, 7) == [7, 14, 21]
    assert candidates(16, 3) == [3, 6, 9]


def test_what_the_compiler_refuses_counts_as_too_large():
    """If a size does not compile, the next smaller one that does is the largest."""

    def measured(size):
        problem = "too large for the compiler" if size > 64 else ""
        return dataclasses.replace(report(size, 1), problem=problem, arguments=0 if problem else 1)

    assert largest(measured, measured(32), candidates(384, 16)) == Search(64, "96: too large for the compiler")
    assert largest(measured, dataclasses.replace(report(32), limit=None), [16, 32]) == Search(None)


def test_a_search_says_what_is_beyond_its_end(config_file, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "compile_program", lambda program, devices: report(program.micro_batch, limit=199))
    path = tmp_path / "report.json"
    assert run(config_file, "--programs=rollout", f"--report={path}") == 0
    said = capsys.readouterr().out
    assert "largest micro-batch that fits: 8 (16 need 0.00 GiB a device)" in said
    rollout = json.loads(path.read_text())["programs"][0]
    assert (rollout["largest"], rollout["beyond"]) == (8, "16 need 0.00 GiB a device")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.", 20.5 * 2**30),
        ("RESOURCE_EXHAUSTED: the memory required for HLO temporaries (2.34T) exceeds available", 2.34 * 2**40),
        ("RESOURCE_EXHAUSTED: E1001: ScopedVmemOom:\nUsed 20.5M of 16.0M vmem.", 0),
        ("UNIMPLEMENTED: no such operation on this device", 0),
    ],
)
def test_the_compilers_error_says_how_much_was_wanted(message, needed):
    fields = too_large(message)
    assert fields.get("temporaries", 0) == int(needed)
    assert message.replace("\n", " ") in fields["problem"]


def test_an_operation_too_large_for_the_chip_is_told_apart_from_a_program_too_large_for_the_device():
    message = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while allocating "
        "on stack for %online-softmax. Scoped allocation with size 32.11M and limit 32.00M exceeded scoped vmem limit "
        "by 116.0K."
    )
    problem = "one operation wants 32.11M of on-chip memory (VMEM), and the compiler has 32.00M"
    assert too_large(message) == {"problem": problem}


def test_the_status_says_whether_everything_fits(config_file, monkeypatch, capsys):
    monkeypatch.setattr(measure, "compile_program", lambda program, devices: report(8, limit=1000))
    assert run(config_file, "--no-search") == 0
    monkeypatch.setattr(measure, "compile_program", lambda program, devices: report(8, limit=179))
    assert run(config_file, "--no-search") == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_all_that_lies_on_a_device_is_counted(config_file):
    """State, policy, reference, tokenizer and path count, also where they are not arguments of a program."""
    config = RunConfig()
    config.model.path = str(DEFAULT_ROOT / "a" / "checkpoint")
    config.model.height, config.model.width = 16, 24
    sizes = read_sizes(config.model.path, 7)
    stages = programs(config, sizes, mesh_of(config, sizes, jax.devices()[:1]))
    parameters = device_bytes(stages["update"].present[0]["policy"])
    assert device_bytes(stages["decode"].present) > 5 * parameters  # masters, two moments, policy, reference


def test_sizes_of_a_published_checkpoint_need_no_folder(tmp_path):
    sizes = read_sizes("models/URSA-1.7B-IBQ512")
    assert (sizes.transformer.num_hidden_layers, sizes.vq.num_vq_embeddings, sizes.text_length) == (28, 131072, 320)
    assert sizes.vq.stride == 16
    folder = tmp_path / "mine"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text("{}")
    for part, name in (("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        (folder / part).mkdir()
        (folder / part / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"transformer config.json lacks hidden_size"):
        read_sizes(str(folder))


def test_usable_memory_of_each_kind():
    assert set(topology.USABLE_HBM) >= {"TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"}
    assert topology.usable_bytes(jax.devices()[0]) is None


def test_the_compiler_that_is_named_is_the_one_that_is_pinned():
    """The manual names every pin; that for the running Python is in the series that the installed jax requires."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tpu-compiler"]
    for pin in pins:
        assert f"`pip install {pin.partition(';')[0]}`" in manual()
    first = pins[0].partition(";")[0]
    assert first.replace("==", " ") in (ROOT / "scripts/compile_table.py").read_text(), "it names the table's compiler"
    ours = pins[sys.version_info >= (3, 12)].partition(";")[0]
    assert ours.startswith(topology.libtpu_series().removesuffix("*"))


def test_a_compiler_of_another_jax_is_named(config_file, monkeypatch, capsys):
    monkeypatch.setattr(topology, "libtpu_series", lambda: "libtpu==0.0.4.*")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.42.1")
    assert run(config_file, "--topology=v5e:2x2") == 2
    assert "libtpu 0.0.42.1 does not fit jax" in capsys.readouterr().err


def test_an_error_of_the_compiler_is_not_called_a_size():
    failed = dataclasses.replace(report(8), **too_large("INTERNAL: no such field"))
    assert describe(failed, None)[0].startswith("update, 8 at a time: DOES NOT COMPILE")
    large = dataclasses.replace(report(8), **too_large("RESOURCE_EXHAUSTED: Ran out of memory"))
    assert describe(large, None)[0].startswith("update, 8 at a time: DOES NOT FIT")
