"""The architectures of the installed mlx-lm and mlx-vlm, read from their sources: importing them takes seconds."""

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def text_architectures() -> frozenset[str]:
    """What mlx-lm loads, with its aliases."""
    package = _package("mlx_lm")
    if package is None:
        return frozenset()
    names = {file.stem for file in package.joinpath("models").glob("*.py")} - {"__init__", "base", "cache"}
    return frozenset(names | _aliases(package, names))


@cache
def vision_architectures() -> frozenset[str]:
    """What mlx-vlm loads that has a vision tower and a language model, with its aliases; none without the package."""
    package = _package("mlx_vlm")
    if package is None:
        return frozenset()
    names = {
        file.parent.name
        for file in package.joinpath("models").glob("*/__init__.py")
        if all(part in file.read_text(encoding="utf-8") for part in ("LanguageModel", "VisionModel"))
    }
    return frozenset(names | _aliases(package, names))


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _aliases(package: Path, names: set[str]) -> set[str]:
    for node in ast.parse(package.joinpath("utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            aliases: dict[str, str] = ast.literal_eval(node.value)
            return {alias for alias, target in aliases.items() if target in names}
    return set()
