"""What README and docs/ say can be done is done here, and what they link to is there.

The examples name ``demo/target`` and ``demo/draft``, as ``specmoeoff demo --build demo`` writes
them; here a tiny pair lies under those names, so everything runs as it is written.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import specmoeoff
from specmoeoff.cli import app, options
from specmoeoff.errors import InvalidInputError
from specmoeoff.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for where in ("", "docs/", "benchmarks/") for page in ROOT.glob(f"{where}*.md"))
IMPORTS = (ast.Import, ast.ImportFrom)
SHELL = {"sh", "bash", "shell", "console"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = "specmoeoff "
NEEDS_NETWORK = {"docs/demo.md"}
"""Pages whose Python examples download; only what they import is tried."""
PAIR = ("demo/target", "demo/draft")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(*languages: str) -> list[Block]:
    return [
        Block(page, text)
        for page in PAGES
        for found, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if found in languages
    ]


def commands() -> list[tuple[str, str]]:
    """Return page and text of every ``specmoeoff`` command in a shell block."""
    found = []
    for block in blocks(*SHELL):
        for line in block.text.replace("\\\n", " ").splitlines():
            parts = [part.strip().removeprefix("$ ") for part in line.split(" | ")]
            found += [(name_of(block.page), part) for part in parts if part.startswith(COMMAND)]
    return found


def runnable(prefix: str) -> list[str]:
    return [
        text
        for page, text in commands()
        if page == "README.md" and text.startswith(f"specmoeoff {prefix} ")
    ]


@pytest.fixture
def workplace(
    tiny_mixtral: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A directory that looks like a clone in which the demo's pair was built."""
    (tmp_path / "demo").mkdir()
    for link, directory in zip(PAIR, (tiny_mixtral, tiny_draft), strict=True):
        (tmp_path / link).symlink_to(directory)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on its own: what this process holds must not count against an example's budget."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )


# Examples -----------------------------------------------------------------------------------------


def test_there_are_examples() -> None:
    assert any(block.page.name == "README.md" for block in blocks("python"))
    assert runnable("generate")
    assert runnable("doctor")
    assert runnable("pack")


@pytest.mark.parametrize("page", sorted({name_of(block.page) for block in blocks("python")}))
def test_python_examples_run(page: str, workplace: Path) -> None:
    """A page's blocks run in order in one namespace, as a reader would type them."""
    code = "\n".join(block.text for block in blocks("python") if name_of(block.page) == page)
    if page in NEEDS_NETWORK:
        statements = ast.parse(code).body
        code = "\n".join(ast.unparse(s) for s in statements if isinstance(s, IMPORTS))
    done = run("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "text"), commands())
def test_commands_parse(page: str, text: str) -> None:
    arguments = shlex.split(text, comments=True)[1:]
    parsed = app.parse(arguments)
    engine = getattr(parsed, "engine", None)
    if engine is not None:
        engine.engine()
    if isinstance(parsed, (options.GenerateOptions, options.ChatOptions)):
        options.sampling_params(parsed.sampling)


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(InvalidInputError):
        app.parse(["generate", "MODEL", "--draught", "DRAFT"])


@pytest.mark.parametrize("text", [*runnable("doctor"), *runnable("generate")])
def test_commands_of_the_readme_run(text: str, workplace: Path) -> None:
    arguments = shlex.split(text, comments=True)[1:]
    for packing in runnable("pack"):
        packed = run("-m", "specmoeoff", *shlex.split(packing, comments=True)[1:])
        assert packed.returncode == 0, packed.stderr
    done = run("-m", "specmoeoff", *arguments)
    assert done.returncode == 0, done.stderr
    if "--output" in arguments:
        results = Path(arguments[arguments.index("--output") + 1]).read_text(encoding="utf-8")
        jobs = Path(arguments[arguments.index("--prompts") + 1]).read_text(encoding="utf-8")
        ids = [json.loads(line)["id"] for line in jobs.splitlines()]
        records = [json.loads(line) for line in results.splitlines()]
        assert [record["id"] for record in records] == ids
        assert all("error" not in record for record in records)


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: name_of(block.page))
def test_job_lines_are_valid(block: Block) -> None:
    for line in block.text.splitlines():
        fields = json.loads(line)
        prompts = {"prompt", "prompt_token_ids", "messages"} & set(fields)
        assert len(prompts) == 1
        SamplingParams.from_dict({k: v for k, v in fields.items() if k not in {"id", *prompts}})


# What pages point to ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)} links to {target}"
        assert found.is_relative_to(ROOT), f"{name_of(page)} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors(found), f"{name_of(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get when it is shown."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", text, re.MULTILINE))
    assert {first or second for first, second in named} <= targets


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d[^\]]*)\]", changes, re.MULTILINE)[0]
    assert specmoeoff.__version__ == project["version"] == newest
