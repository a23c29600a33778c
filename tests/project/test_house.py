"""The rules of the code base, checked on the sources: allowed imports, where names may be used, maximum lengths.

A failure lists every place that breaks a rule. The fix is to move the code to where it belongs, not to add the place to
a list here.
"""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from udm_grpo import config as config_module
from udm_grpo.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("udm_grpo", "rewards_bridge", "scripts", "configs")
MIDDLE = ("udm_grpo/model/", "udm_grpo/diffusion/", "udm_grpo/grpo/")
LAYERS = {
    "machine": ("config",),
    "model": ("config", "batches"),
    "multihost": ("config",),
    "diffusion": ("batches",),
    "files": ("machine", "multihost"),
    "configuration": ("config", "machine", "model", "files", "grpo"),
    "grpo": ("config", "batches", "model", "diffusion"),
    "reporting": ("config", "files"),
    "tensor_files": ("batches", "machine", "files"),
    "data": ("machine", "files", "reporting", "tensor_files"),
    "released": ("batches", "machine", "model", "files", "tensor_files", "data"),
    "checkpoints": ("config", "batches", "export", "model", "files", "multihost", "tensor_files", "released"),
    "scoring": ("config", "models", "machine", "files", "reporting", "data", "released"),
}
"""Package of udm_grpo -> what else of udm_grpo it may import. Packages not listed here compose the others."""
RIM = tuple(f"udm_grpo.{name}" for name in LAYERS if name not in ("model", "diffusion", "grpo"))
"""The packages that work with files, processes and the network."""
BRIDGE_FACE = (
    "rewards_bridge.client",
    "rewards_bridge.composition",
    "rewards_bridge.errors",
    "rewards_bridge.flags",
    "rewards_bridge.picture_files",
    "rewards_bridge.redaction",
    "rewards_bridge.scorers.base",
    "rewards_bridge.scorers.geneval_metadata",
)
TORCH_FILES = ("scripts/torch_reference.py", "scripts/benchmark_torch.py", "scripts/benchmark_versus.py")
"""The independent models that ours is compared with; the first runs in a process of its own."""
TORCH = ("torch", "transformers", "diffusers", "peft", "timm", "open_clip", "torchvision")
"""Torch and packages that import it; so does safetensors.torch."""
TORCHVISION_FILES = ("rewards_bridge/scorers/torch_models.py", "rewards_bridge/scorers/clip_open.py")
"""These declare torchvision's operators before they import models; scripts/torch_reference.py blocks torchvision."""
UNSAFE_MODULES = ("pickle", "_pickle", "marshal", "dill", "cloudpickle", "joblib", "shelve")
AXES = ("data", "fsdp", "tensor")
AXIS_CALLS = (
    *("PartitionSpec", "P", "NamedSharding", "Mesh", "make_mesh", "shard_map"),
    *(
        "psum",
        "pmean",
        "pmax",
        "pmin",
        "all_gather",
        "all_to_all",
        "ppermute",
        "psum_scatter",
        "axis_index",
        "axis_size",
    ),
)
SPECS = ("jax.sharding.PartitionSpec", "sharding.PartitionSpec", "jax.P", "jax.make_mesh")
COMPILERS = ("jit", "pjit", "pmap")
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 350
OPTIONAL = ("wandb", "ImageReward")
"""Packages that users install themselves when a config needs them."""


@functools.cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


@functools.cache
def sources(*folders: str) -> tuple[str, ...]:
    """Return the Python files below these folders, relative to the root, without those that protoc generated."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py") if not path.stem.endswith("_pb2"))
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in paths))


def imports(path: str) -> Iterator[tuple[str, int]]:
    """Yield (full dotted name, line) of every import, anywhere in the file."""
    package = list(Path(path).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__") and node.args:
            named = node.args[0]
            if isinstance(named, ast.Constant):
                yield str(named.value), node.lineno


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def last_name(node: ast.expr) -> str:
    """Return `c` for a.b.c, `a` for a, and "" for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def forbidden_imports(paths: tuple[str, ...], *packages: str) -> list[str]:
    return [f"{path}:{line}: {name}" for path in paths for name, line in imports(path) if within(name, *packages)]


def check(broken: list[str], rule: str) -> None:
    if broken:
        pytest.fail("\n  ".join([f"{rule}:", *broken]), pytrace=False)


def test_the_middle_uses_no_files_no_clock_and_no_process():
    outside = ("os", "sys", "time", "logging", "subprocess", *RIM)
    middle = tuple(path for path in sources("udm_grpo") if path.startswith(MIDDLE))
    assert len(middle) > 10
    check(forbidden_imports(middle, *outside), "model, diffusion and grpo take arrays and return arrays")


def test_packages_import_only_what_their_layer_may():
    broken = []
    for package, others in LAYERS.items():
        allowed = [f"udm_grpo.{name}" for name in (package, *others)]
        for path in sources(f"udm_grpo/{package}"):
            broken += [
                f"{path}:{line}: {name}"
                for name, line in imports(path)
                if within(name, "udm_grpo") and not within(name, *allowed)
            ]
    check(broken, "LAYERS says who may import whom")


def test_only_steps_compiles():
    broken = []
    for path in sources(*PRODUCT):
        if path == "udm_grpo/compiled.py":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr in COMPILERS:
                broken.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
        broken += [
            f"{path}:{line}: import of {name}"
            for name, line in imports(path)
            if within(name, "jax", "flax") and name.split(".")[-1] in COMPILERS
        ]
    check(broken, "only udm_grpo/compiled.py calls jax.jit")


def axis_contexts(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the expressions in which a string can only be the name of a mesh axis."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and last_name(node.func) in AXIS_CALLS:
            yield from (*node.args, *node.keywords)
        elif isinstance(node, ast.Subscript) and last_name(node.value) == "shape":
            yield node.slice
        elif isinstance(node, ast.keyword) and node.arg in ("axis_name", "axis_names"):
            yield node.value


def test_only_mesh_names_mesh_axes():
    elsewhere = tuple(path for path in sources(*PRODUCT) if path != "udm_grpo/mesh.py")
    broken = forbidden_imports(elsewhere, "jax.sharding.PartitionSpec", "jax.P", "jax.make_mesh")
    for path in elsewhere:
        inside = {node for context in axis_contexts(tree_of(path)) for node in ast.walk(context)}
        for node in inside:
            if isinstance(node, ast.Constant) and node.value in AXES:
                broken.append(f"{path}:{node.lineno}: the axis {node.value!r}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in SPECS:
                broken.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    check(broken, "only udm_grpo/mesh.py names mesh axes and creates PartitionSpecs")


def test_only_the_models_import_flax():
    elsewhere = tuple(path for path in sources(*PRODUCT) if not path.startswith("udm_grpo/model/"))
    check(forbidden_imports(elsewhere, "flax"), "only udm_grpo/model imports flax")


def test_the_trainer_never_imports_torch():
    elsewhere = tuple(path for path in sources("udm_grpo", "scripts", "configs") if path not in TORCH_FILES)
    broken = forbidden_imports(elsewhere, *TORCH, "safetensors.torch")
    for path in sources(*PRODUCT):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if arguments.get("weights_only") != "True":
                    broken.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
    check(broken, f"only rewards_bridge and {', '.join(TORCH_FILES)} import torch, and load with weights_only=True")


def test_models_that_import_torchvision_come_from_where_its_operators_are_declared():
    elsewhere = tuple(path for path in sources("rewards_bridge") if path not in TORCHVISION_FILES)
    broken = forbidden_imports(elsewhere, "transformers", "open_clip", "timm", "torchvision")
    check(broken, f"in rewards_bridge only {', '.join(TORCHVISION_FILES)} import packages that import torchvision")


def test_nothing_that_is_read_can_run_code():
    broken = forbidden_imports(sources(*PRODUCT), *UNSAFE_MODULES)
    for path in sources(*PRODUCT):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                broken += [f"{path}:{node.lineno}: {what}" for what in unsafe_call(node)]
    check(broken, "no file, message or command line is executed")


def unsafe_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
        yield called
    for word in node.keywords:
        value = ast.unparse(word.value)
        if (word.arg == "shell" and value != "False") or (word.arg == "allow_pickle" and value != "False"):
            yield f"{called}({word.arg}={value})"


def test_the_trainer_sees_of_the_bridge_only_its_face():
    broken = [
        place
        for place in forbidden_imports(sources("udm_grpo"), "rewards_bridge")
        if not within(place.split(": ")[1], *BRIDGE_FACE)
    ]
    check(broken, f"of rewards_bridge, udm_grpo imports only {', '.join(BRIDGE_FACE)}")


def test_the_bridge_stands_alone():
    broken = forbidden_imports(sources("rewards_bridge"), "jax", "jaxlib", "flax", "optax", "udm_grpo")
    check(broken, "rewards_bridge runs under an interpreter without jax and without udm_grpo")


def test_functions_and_files_stay_short():
    broken = []
    for path in sources(*PRODUCT):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            broken.append(f"{path}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    broken.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    check(broken, f"a function has at most {MAX_FUNCTION_LINES} lines and a file {MAX_FILE_LINES}")


def undocumented(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public classes, functions and methods without a docstring."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body)


VAGUE = {"given", "found", "made", "wanted", "told", "about"}
"""Words that say how a value came about and not what it is."""


def test_no_name_is_vague():
    broken = []
    for path in sources(*PRODUCT, "tests"):
        for node in ast.walk(tree_of(path)):
            name = getattr(node, "arg", None) or getattr(node, "id", None) or getattr(node, "name", None)
            if name in VAGUE:
                broken.append(f"{path}:{getattr(node, 'lineno', '?')}: {name}")
    check(broken, "names are nouns of the field, such as args, expected, result, metadata")


def test_everything_public_says_what_it_is():
    broken = []
    for path in sources(*PRODUCT):
        if not ast.get_docstring(tree_of(path)):
            broken.append(f"{path}: the module")
        broken += [f"{path}:{node.lineno}: {node.name}" for node in undocumented(tree_of(path).body)]
    check(broken, "every public module, class and function has a docstring")


def sections() -> dict[str, type]:
    """Return section of RunConfig -> its dataclass."""
    config = RunConfig()
    types = {field.name: type(getattr(config, field.name)) for field in fields(config)}
    return {name: kind for name, kind in types.items() if is_dataclass(kind)}


def test_every_config_field_says_what_it_is():
    broken = []
    for node in tree_of("udm_grpo/config.py").body:
        if not isinstance(node, ast.ClassDef) or not is_dataclass(getattr(config_module, node.name)):
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or ast.unparse(statement.target) in sections():
                continue  # a section of RunConfig is described by its own class
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if not described:
                broken.append(f"{node.name}.{ast.unparse(statement.target)}")
    check(broken, "every config field has a docstring below it")


def part_of(node: ast.expr, known: dict[str, str]) -> str | None:
    """Return the config section that an expression is: "" for the whole config, None for no section.

    `known` maps local names to sections.
    """
    if isinstance(node, ast.Attribute) and node.attr in sections():
        return node.attr
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    return "" if last_name(node) == "config" else None


def local_names(function: ast.AST) -> dict[str, str]:
    """Return local name of a function -> config section: rollout = config.rollout, or an annotated argument."""
    classes = {kind.__name__: name for name, kind in sections().items()} | {"RunConfig": ""}
    known = {}
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.annotation is not None and ast.unparse(node.annotation) in classes:
            known[node.arg] = classes[ast.unparse(node.annotation)]
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = zip(target.elts, node.value.elts, strict=False) if both else [(target, node.value)]
                for name, value in pairs:
                    part = part_of(value, {})
                    if isinstance(name, ast.Name) and part is not None:
                        known[name.id] = part
    return known


def fields_read(path: str) -> Iterator[str]:
    """Yield the dotted config fields that a file reads; "section.*" where it passes a whole section to asdict."""
    for function in ast.walk(tree_of(path)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        known = local_names(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                part = part_of(node.value, known)
                if part is not None:
                    yield f"{part}.{node.attr}".removeprefix(".")
            elif isinstance(node, ast.Call) and last_name(node.func) == "asdict" and node.args:
                part = part_of(node.args[0], known)
                if part:
                    yield f"{part}.*"


def test_every_config_field_is_read():
    paths = [path for path in sources("udm_grpo") if path != "udm_grpo/config.py"]
    read = {name for path in paths for name in fields_read(path)}
    nodes = [node for path in paths for node in ast.walk(tree_of(path))]
    words = {node.arg for node in nodes if isinstance(node, ast.arg)}
    words |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    required = {field.name for field in fields(RunConfig)} - set(sections())
    for part, kind in sections().items():
        names = {field.name for field in fields(kind)}
        required |= {f"{part}.{name}" for name in names if f"{part}.*" not in read or name not in words}
    check(sorted(required - read), "every config field is read outside udm_grpo/config.py")


def test_no_text_names_a_place_of_the_machine_it_was_written_on():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    leak = re.compile(r"(?<![\w.\-])/(work|root|opt)/|pypi\.org|pythonhosted\.org|registry\.npmjs|file:[/]{2}")
    broken = []
    for name in filter(None, listed.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # binary, or deleted but not yet committed
        lines = enumerate(text.splitlines(), 1)
        broken += [f"{name}:{number}: {line.strip()[:100]}" for number, line in lines if leak.search(line)]
    check(broken, "no local path and no registry host in the repository")


def pins(path: str) -> dict[str, str]:
    """Return distribution -> version of a requirements file, or of the trainer's dependencies in pyproject.toml."""
    text, versions = (ROOT / path).read_text(encoding="utf-8"), {}
    toml = path.endswith(".toml")
    for line in tomllib.loads(text)["project"]["dependencies"] if toml else text.splitlines():
        words = line.split("#")[0].partition(";")[0].strip()
        if words:
            name, equals, version = words.partition("==")
            assert equals, f"{path}: {words} is not pinned"
            versions[canonical(name)] = version
    return versions


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.split("[")[0]).lower()


def test_both_requirements_pin_the_same():
    ours, theirs = pins("requirements.txt"), pins("rewards_bridge/requirements.txt")
    check(
        [f"{name}=={version}" for name, version in theirs.items() if ours.get(name) != version],
        "rewards_bridge/requirements.txt pins what requirements.txt pins",
    )


@pytest.mark.parametrize(
    ("file", "folders"),
    [
        ("requirements.txt", (*PRODUCT, "tests")),
        ("rewards_bridge/requirements.txt", ("rewards_bridge",)),
        ("pyproject.toml", ("udm_grpo", "configs")),
    ],
)
def test_every_package_that_is_imported_is_pinned(file, folders):
    pinned, provided = pins(file), importlib.metadata.packages_distributions()
    own = {*PRODUCT, *(path.stem for path in (ROOT / "tests").glob("*.py")), *OPTIONAL, *sys.stdlib_module_names}
    broken = []
    for path in sources(*folders):
        for name, line in imports(path):
            top = name.split(".")[0]
            if top not in own and not {canonical(provider) for provider in provided.get(top, [])} & set(pinned):
                broken.append(f"{path}:{line}: {name}")
    check(broken, f"{file} pins every package that is imported")


def test_commands_catch_the_errors_that_are_for_users_and_no_others():
    """A ValueError or KeyError of a library is a bug: it ends in a traceback and status 1."""
    allowed = {
        "UserError",
        "OSError",
        "BridgeError",
        "ConfigError",
        "KeyboardInterrupt",
        "StopRequestedError",
        "expected",
    }
    broken = []
    for path in sources(*PRODUCT):
        for function in ast.walk(tree_of(path)):
            if not isinstance(function, ast.FunctionDef) or function.name not in ("main", "_main"):
                continue
            for handler in ast.walk(function):
                if not isinstance(handler, ast.ExceptHandler) or handler.type is None:
                    continue
                types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
                broken += [f"{path}:{handler.lineno}: {name}" for name in map(last_name, types) if name not in allowed]
    check(broken, "a command catches UserError and OSError")
