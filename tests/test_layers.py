"""The walls of the architecture: who may import whom, and what must answer fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKED = (
    *("augment", "config", "datasets", "formats", "methods", "networks", "optimizer"),
    *("ranges", "runs", "space", "strict", "terms", "transfer"),
    *(f"generative.{name}" for name in ("config", "modes", "networks", "tables")),
)
TRAINING = ("following", "populations", "train", "trial", "trials")
PARQUET = ("columns", "forward", "inspection", "parts", "read", "storage")
# who may know a library; numpy and torch are everyone's
OWNERS = {
    "PIL": {"decoding", "samples"},
    "filelock": {"cache.read", "cache.storage", "train"},
    "jaxtyping": {"diagnostics"},
    "jinja2": {"page"},
    "matplotlib": {"figures", "generative.figures", "overviews", "page", "responses"},
    "mlflow": {"registry", "tracking"},
    "onnxruntime": {"exports"},
    "optuna": {"searchers"},
    "psutil": {"usage"},
    "pyarrow": {
        *(f"cache.{name}" for name in PARQUET),
        "archives",
        "generative.cache",
        "parquet",
        "synthesize",
    },
    "pydantic": {*CHECKED},
    "ray": {"cache.write", "cluster", "pruning", "searchers", "submit", "synthesize", *TRAINING},
    "rich": {"console"},
    "safetensors": {"models"},
    "scipy": {"significance"},
    "sklearn": {"figures", "sources"},
    "timm": {"models"},
    "torchvision": {"models", "sources"},
    "typer": {"cli"},
    "yaml": {"loading"},
}


def test_imports_keep_to_the_layers() -> None:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_every_library_has_its_owners_in_pipelines() -> None:
    known: dict[str, set[str]] = {}
    for path in ROOT.glob("pipelines/**/*.py"):
        module = ".".join(path.relative_to(ROOT / "pipelines").with_suffix("").parts)
        for library in third_party(path):
            known.setdefault(library, set()).add(module)
    assert known == OWNERS


def third_party(path: Path) -> set[str]:
    """The libraries that a file imports, but for those of Python, this project, numpy and torch."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    ours = sys.stdlib_module_names | {"kdcore", "pipelines", "numpy", "torch"}
    return {name.partition(".")[0] for name in names} - ours


@pytest.mark.parametrize("module", ["pipelines.loading", "pipelines.cli", "pipelines.build"])
def test_checking_a_configuration_waits_for_nothing_heavy(module: str) -> None:
    slow = ["ray", "mlflow", "timm", "torchvision", "ot", "sklearn", "torchmetrics"]
    assert not imported(module, slow)


def test_a_trial_s_actor_imports_only_what_trains() -> None:
    assert not imported("pipelines.trial", ["mlflow", "optuna", "torchmetrics"])


def imported(module: str, libraries: list[str]) -> list[str]:
    """Those of the libraries that come with a module."""
    code = f"import sys, {module}; print(*[name for name in {libraries!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def test_kdcore_needs_none_of_the_product_around_it() -> None:
    code = "import sys, kdcore.step, kdcore.models; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "base", "helpers", "misc"}
    named = {
        path.stem for folder in ("kdcore", "pipelines") for path in ROOT.glob(f"{folder}/**/*")
    }
    assert not named & empty
