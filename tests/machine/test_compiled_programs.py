"""Compiled programs are kept beside the outputs, for this user and this kind of CPU only."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from udm_grpo.machine import compiled_programs
from udm_grpo.machine.compiled_programs import FOLDER, kept_programs


@pytest.fixture(autouse=True)
def nothing_set() -> Iterator[None]:
    """No folder is named by the environment, and every program is slow enough to be kept."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compiled_programs.reset_cache()


def compile_one(number: float) -> None:
    jax.jit(lambda x: x * number + 1)(2.0).block_until_ready()


def programs(outputs: Path) -> list[str]:
    return sorted(path.name for path in (outputs / FOLDER).glob("*/*"))


def test_what_is_compiled_in_the_block_is_kept(tmp_path, capsys):
    compile_one(3.5)  # JAX has looked for a folder already, and found none
    with kept_programs(tmp_path):
        compile_one(4.5)
        first = programs(tmp_path)
        assert first
        jax.clear_caches()
        compile_one(4.5)
        assert programs(tmp_path) == first
    compile_one(5.5)
    assert programs(tmp_path) == first
    assert jax.config.jax_compilation_cache_dir is None
    assert ((tmp_path / FOLDER).stat().st_mode & 0o777) == 0o700
    assert capsys.readouterr().err == ""


def test_a_folder_that_the_environment_names_is_left_alone(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    with kept_programs(tmp_path):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (tmp_path / FOLDER).exists()


def test_another_kind_of_cpu_has_another_folder(tmp_path, monkeypatch):
    with kept_programs(tmp_path):
        here = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(compiled_programs, "_kind_of_cpu", lambda: "riscv64-0")
    with kept_programs(tmp_path):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / FOLDER / "riscv64-0") != here


def of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)


def of_a_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.touch()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_another_user, "belongs to another user"),
        (of_a_group, "other users may write to"),
        (a_link, "is not a folder"),
        (a_file, "cannot be made"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_not_used(tmp_path, monkeypatch, capsys, make, reason):
    make(tmp_path / FOLDER, monkeypatch)
    with kept_programs(tmp_path):
        assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not kept: ")
    assert reason in line
    assert str(tmp_path / FOLDER) in line
