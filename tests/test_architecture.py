"""The rules of docs/architecture.md that can be checked, and README's tree against the files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "specmoeoff"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_LINES = 300
LONGER = {
    "cli/commands.py": (360, "one declaration per option of each command"),
    "engine/engine.py": (400, "the step is read from top to bottom in one place"),
    "engine/memory_plan.py": (375, "every part of the budget is named and counted in one place"),
    "kernels/native.py": (420, "one thin function per kernel"),
    "kernels/reference.py": (480, "the specification of every kernel, to be read in one go"),
    "llm.py": (440, "the public class: its methods and their docstrings belong together"),
    "offload/expert_store.py": (430, "choosing, fetching and dropping share the same few arrays"),
    "offload/reader.py": (340, "the queue, what serves it and how it ends share one lock"),
}
"""Files that may be longer: up to how many lines, and why."""
BAD_MODULES = re.compile(r"utils?|helpers?|common|managers?|misc")
BAD_CLASSES = re.compile(r"(Manager|Handler|Wrapper|Helper|Utils)$")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def offenders(paths: Iterable[Path], find: Callable[[Path], Any]) -> dict[str, Any]:
    """Return what ``find`` finds in each file, for the files in which it finds something."""
    found = {name_of(path): find(path) for path in paths}
    listed = {name: list(w) if isinstance(w, Iterable) else w for name, w in found.items()}
    return {name: what for name, what in listed.items() if what}


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of the modules that a file imports, wherever in it that is."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Imports ------------------------------------------------------------------------------------------


def test_import_contracts_are_kept() -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_part_of_the_package_has_a_layer() -> None:
    """A module that no contract names may import anything, so none may be missing by oversight."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    named = set(re.findall(r"specmoeoff\.(\w+)", " ".join(layers)))
    there = {path.stem for path in PACKAGE.glob("*.py")}
    there |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    # The first two stand above all layers; the last four are parts of text and sampling.
    outside = {"__init__", "__main__"}
    outside |= {"chat_template", "stop_strings", "tokenizer_config", "penalties"}
    assert there - outside == named - outside


def test_only_kernels_import_the_native_module() -> None:
    inner = re.compile(r"specmoeoff\.kernels\.(_native|native|reference)\b")
    outside = [path for path in SOURCES if not path.is_relative_to(PACKAGE / "kernels")]
    assert offenders(outside, lambda path: [n for n in imports(path) if inner.match(n)]) == {}


def test_no_torch_and_no_transformers() -> None:
    """But for the torch device, which is imported where one is asked for and nowhere at once."""
    heavy = {"torch", "transformers", "accelerate", "gguf"}
    device = [path for path in SOURCES if path.match("devices/torch_*.py")]
    others = [path for path in SOURCES if path not in device]
    found = offenders(others, lambda path: {n.partition(".")[0] for n in imports(path)} & heavy)
    assert found == {}
    assert device, "the exception is still needed"


# Files --------------------------------------------------------------------------------------------


def test_no_print() -> None:
    """The command line writes through cli/console.py; all else returns what it has to say."""
    assert offenders(SOURCES, print_lines) == {}


def print_lines(path: Path) -> list[int]:
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    return [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def test_files_are_short() -> None:
    """Over the limit there is a second idea to move out; an exception needs a reason."""
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert set(LONGER) <= set(lengths)
    limits = {name: LONGER[name][0] if name in LONGER else MAX_LINES for name in lengths}
    assert {name: n for name, n in lengths.items() if n > limits[name]} == {}


def test_modules_say_what_they_are() -> None:
    assert offenders(SOURCES, lambda path: bool(parsed(path).body) and not docstring(path)) == {}


def docstring(path: Path) -> str | None:
    return ast.get_docstring(parsed(path))


def test_names_say_what_a_thing_is() -> None:
    assert [name_of(path) for path in SOURCES if BAD_MODULES.fullmatch(path.stem)] == []
    assert offenders(SOURCES, lambda path: filter(BAD_CLASSES.search, class_names(path))) == {}


def class_names(path: Path) -> list[str]:
    return [node.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]


# README's tree ------------------------------------------------------------------------------------


def tree() -> dict[str, str]:
    """Return path -> comment of README's tree; directories end in a slash."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## The tree\n+```\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in block[1].splitlines():
        match = re.fullmatch(r"((?:  )*)(\S+)(?: +(\S.*))?", line)
        assert match is not None, line
        depth = len(match[1]) // 2
        parents = parents[:depth]
        assert len(parents) == depth, f"{line!r} is under no directory"
        path = "".join(parents) + match[2]
        assert path not in entries, f"{path} is there twice"
        entries[path] = match[3] or ""
        if match[2].endswith("/"):
            parents.append(match[2])
    return entries


def test_what_the_tree_names_is_there() -> None:
    for path in tree():
        found = ROOT / path
        assert found.is_dir() if path.endswith("/") else found.is_file(), path


def test_every_entry_of_the_tree_has_a_comment() -> None:
    entries = tree()
    bare = {path for path, comment in entries.items() if not comment}
    assert bare == {"src/specmoeoff/"}


def test_directories_that_the_tree_opens_are_complete() -> None:
    entries = tree()
    opened = {path[: path.rstrip("/").rfind("/") + 1] for path in entries} & set(entries)
    assert "src/specmoeoff/" in opened
    for directory in opened:
        there = {
            f"{directory}{path.name}{'/' if path.is_dir() else ''}"
            for path in (ROOT / directory).iterdir()
            if path.name != "__pycache__" and path.suffix != ".so"
        }
        named = {path for path in entries if re.fullmatch(re.escape(directory) + r"[^/]+/?", path)}
        assert there == named, f"{directory}: {sorted(there ^ named)}"
