"""Installation with pip: the contents of the wheel, the trainer without torch, the extras.

pip creates two environments, one for the trainer and one for the scorer. If no package index can be reached, these
tests are skipped, or fail if UDM_GRPO_REQUIRE_INSTALL=1.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("udm_grpo", "rewards_bridge", "configs", "scripts")
OFFLINE = re.compile(r"connection broken by|Failed to establish a new connection|Temporary failure in name resolution")
SHAPES_SCORER = ("grpcio", "grpcio-health-checking", "protobuf", "numpy", "pillow", "scikit-image", "scipy")
"""The packages of rewards_bridge/requirements.txt that the scorer of the shapes world needs."""
NOT_OF_THE_TRAINER = ("torch", "transformers", "gradio", "pytest", "skimage", "paddleocr", "beartype", "peft")
PIP = "pip>=23.3"
"""The first pip whose --dry-run downloads a wheel's metadata instead of the wheel; the wheels of CUDA are 3 GB."""


def pip(*words: str | Path, newest: Path | None = None) -> str:
    """Run pip; skip the test if it reaches no index, unless UDM_GRPO_REQUIRE_INSTALL=1."""
    options = ("--quiet", "--no-input", "--disable-pip-version-check")
    path = {"PYTHONPATH": str(newest)} if newest else {}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_RETRIES": "1"} | path
    command = [sys.executable, "-m", "pip", *words[:-1], *options, words[-1]]
    done = subprocess.run(command, cwd=ROOT.parent, env=env, capture_output=True, text=True, timeout=550)
    if done.returncode and OFFLINE.search(done.stderr) and os.environ.get("UDM_GRPO_REQUIRE_INSTALL") != "1":
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(python: Path, *words: str, cwd: Path, status: int = 0) -> str:
    """Run an installed command in a folder, without this checkout on its path; return its output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"JAX_COMPILATION_CACHE_DIR": os.environ["UDM_GRPO_COMPILED"], "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([python, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def make_venv(folder: Path) -> Path:
    """Create an empty environment; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def newest_pip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pip")
    pip("install", "--no-compile", "--target", folder, PIP)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, newest_pip):
    """The wheel, built from a clean copy of the sources."""
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip("wheel", "--no-deps", "--wheel-dir", output, sources, newest=newest_pip)
    (file,) = output.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, wheel, newest_pip):
    """The interpreter of an environment with the wheel and its dependencies, without extras."""
    python = make_venv(tmp_path_factory.mktemp("trainer"))
    pip("--python", python, "install", "--no-compile", wheel, newest=newest_pip)
    return python


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, newest_pip):
    """The interpreter of an environment with the dependencies of the shapes scorer, but without our packages."""
    lines = (ROOT / "rewards_bridge" / "requirements.txt").read_text().splitlines()
    needed = [line.split("#")[0].strip() for line in lines if line.partition("==")[0] in SHAPES_SCORER]
    assert len(needed) == len(SHAPES_SCORER)
    python = make_venv(tmp_path_factory.mktemp("scorer"))
    pip("--python", python, "install", "--no-compile", *needed, newest=newest_pip)
    return python


def tracked() -> set[str]:
    """Return the files of the packages that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == tracked()


def test_an_editable_install_runs_the_checkout_it_was_made_from(tmp_path, newest_pip):
    """The install shares the libraries of this environment and runs from an empty folder."""
    sources, empty = tmp_path / "sources", tmp_path / "empty"
    empty.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    python = make_venv(tmp_path / "venv")
    pip("--python", python, "install", "--no-deps", "--no-compile", f"--editable={sources}", newest=newest_pip)
    folder = "import sysconfig; print(sysconfig.get_path('purelib'))"
    libraries = run(Path(sys.executable), "-c", folder, cwd=empty).strip()
    (Path(run(python, "-c", folder, cwd=empty).strip()) / "libraries.pth").write_text(f"{libraries}\n")
    said = run(python, "-m", "udm_grpo.train", "--config", "configs/shapes.py:smoke", "--help", cwd=empty)
    assert "--config.iterations=4\n" in said
    code = "import udm_grpo, rewards_bridge, configs, scripts; print(udm_grpo.__file__)"
    assert run(python, "-c", code, cwd=empty).strip() == str(sources / "udm_grpo" / "__init__.py")


def missing(python: Path, modules: Sequence[str], cwd: Path) -> list[str]:
    code = (
        f"import importlib.util, json; print(json.dumps([m for m in {modules!r} if not importlib.util.find_spec(m)]))"
    )
    return json.loads(run(python, "-c", code, cwd=cwd))


def test_a_trainer_without_torch_runs_with_the_scorer_of_another_environment(trainer, scorer, tmp_path):
    assert missing(trainer, NOT_OF_THE_TRAINER, tmp_path) == list(NOT_OF_THE_TRAINER)
    assert missing(scorer, ("jax", "rewards_bridge"), tmp_path) == ["jax", "rewards_bridge"]
    interpreter = f"--config.rewards.scorers.shapes.interpreter={scorer}"
    run(trainer, "-m", "udm_grpo.train", "--config", "configs/shapes.py:smoke", interpreter, cwd=tmp_path)
    output = tmp_path / "outputs" / "shapes-smoke"
    assert json.loads((output / "summary.json").read_text())["iterations"] == 4
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4
    assert (output / "report.html").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    run(trainer, "-m", "udm_grpo.report", "outputs/shapes-smoke", "--output", "page.html", cwd=tmp_path)
    sample = ("--prompt", "a photo of a red circle", "--output", "pictures", "--height", "32", "--width", "32")
    run(trainer, "-m", "udm_grpo.sample", "--run", "outputs/shapes-smoke", *sample, cwd=tmp_path)


@pytest.mark.parametrize(
    "module",
    ["udm_grpo.evaluate", "udm_grpo.convert", "udm_grpo.pretrain", "rewards_bridge", "scripts.prepare_prompts"],
)
def test_the_other_commands_are_installed_too(trainer, tmp_path, module):
    assert "usage: " in run(trainer, "-m", module, "--help", cwd=tmp_path)


def test_a_recipe_is_found_where_it_is_installed(trainer, tmp_path):
    code = "import configs.shapes; print(configs.shapes.__file__)"
    file = run(trainer, "-c", code, cwd=tmp_path).strip()
    assert "site-packages" in file
    for config in (f"{file}:smoke", "configs/shapes.py:smoke"):
        assert "--config.iterations=4\n" in run(
            trainer, "-m", "udm_grpo.train", "--config", config, "--help", cwd=tmp_path
        )
    said = run(trainer, "-m", "udm_grpo.train", "--config=configs/shapes.py", cwd=tmp_path, status=2)
    assert "scikit-image" in said.splitlines()[-1]


def pins(lines: Sequence[str]) -> set[str]:
    """Return requirements as a set, without comments and spaces."""
    return {re.sub(r"\s|[\"']", "", line.split("#")[0]) for line in lines} - {""}


def test_requirements_and_pyproject_pin_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"cuda13", "tpu", "rewards", "ocr", "demo", "gcs", "dev"} <= set(extras)
    assert extras["dev"][0] == "udm-grpo[rewards,ocr,demo,gcs]"
    names = ("rewards", "ocr", "demo", "gcs", "dev")
    ours = project["dependencies"] + [line for name in names for line in extras[name]]
    assert pins(ours) - pins(extras["dev"][:1]) == pins((ROOT / "requirements.txt").read_text().splitlines())
    jax = {line for line in pins(project["dependencies"]) if line.startswith("jax==")}
    for name in ("cuda13", "tpu"):
        assert pins(extras[name]) == {line.replace("jax==", f"jax[{name}]==") for line in jax}


@pytest.mark.parametrize("extras", ["cuda13", "tpu,tpu-compiler", "rewards,ocr,demo,gcs,dev"])
def test_the_extras_resolve(wheel, newest_pip, extras):
    pip("install", "--dry-run", f"{wheel}[{extras}]", newest=newest_pip)
