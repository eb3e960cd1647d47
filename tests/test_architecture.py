"""The shape of the project, held by tests: direction of imports, who prints, how light the command line is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ctp_cli"

# A layer may import itself and the layers after it.
LAYERS = [
    {"__main__"},
    {"app"},
    {"commands"},
    {"runner"},
    {"stages"},
    {"prompts", "evaluation", "benchmark", "checkpoints", "compression", "integration"},
    {"models", "data"},
]
ANYWHERE = {"errors", "progress", "files", "memory", "__init__"}
UPPER_ONLY = {"recipe": {"commands", "runner", "stages"}, "artifact": {"commands", "runner", "stages"}}
SAME_LAYER = {  # who may use whom among equals
    "checkpoints": {"compression"},
    "prompts": {"evaluation", "checkpoints"},
    "integration": {"checkpoints"},
}
# models/loading reads packed checkpoints, whose form is the checkpoints' business, and keeps them packed if asked to
KNOWN_UPWARD = {("models/loading.py", "checkpoints")}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def layer(part: str) -> int | None:
    return next((index for index, members in enumerate(LAYERS) if part in members), None)


def allowed(path: Path, imported: str) -> bool:
    here, there = part_of(path), imported.split(".")[1] if "." in imported else "__init__"
    if there in ANYWHERE or here == there or there == "__version__":
        return True
    if there in UPPER_ONLY:
        return here in UPPER_ONLY[there] or here == "app"
    if there == "console":
        return here in {"app", "commands"}
    mine, other = layer(here), layer(there)
    if mine is None or other is None:
        return False
    if mine == other:
        return there in SAME_LAYER.get(here, set())
    return mine < other or (str(path.relative_to(PACKAGE)), there) in KNOWN_UPWARD


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    wrong = [name for name in imports(path) if name.split(".")[0] == "ctp_cli" and not allowed(path, name)]
    assert not wrong


def test_the_rule_above_can_fail() -> None:
    assert not allowed(PACKAGE / "data" / "windows.py", "ctp_cli.stages.learn")
    assert not allowed(PACKAGE / "compression" / "solver.py", "ctp_cli.recipe.CompressSection")
    assert not allowed(PACKAGE / "models" / "blocks.py", "ctp_cli.console.Console")


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_stand_alone(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("ctp_cli")]


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package 'kernels'"


def test_only_the_console_prints() -> None:
    printing = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                printing.append(path.name)
    assert not printing


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["run", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom ctp_cli.app import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
