"""The package and its help come without what is heavy: seen in the modules, not on a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import specmoeoff

HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub"}
REPORT = "import json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after ``code``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def run_cli(*arguments: str) -> str:
    return (
        f"import sys; sys.argv = ['specmoeoff', *{arguments!r}]\n"
        "from specmoeoff.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )


def test_importing_the_package_brings_only_the_standard_library() -> None:
    bare = modules_after("pass")
    after = modules_after("import specmoeoff")
    assert {name for name in after - bare if name not in sys.stdlib_module_names} == {"specmoeoff"}


def test_the_configurations_need_no_numpy() -> None:
    code = "from specmoeoff import EngineConfig, Policy, RequestOutput, SamplingParams"
    assert not (HEAVY | {"typer", "rich"}) & modules_after(code)


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("--version",)])
def test_help_brings_nothing_heavy(arguments: tuple[str, ...]) -> None:
    modules = modules_after(run_cli(*arguments))
    assert "typer" in modules
    assert not HEAVY & modules


def test_what_runs_beside_the_model_has_no_parser() -> None:
    modules = modules_after("import specmoeoff.cli.fresh, specmoeoff.cli.generate")
    modules |= modules_after(
        "import specmoeoff.cli.chat, specmoeoff.cli.progress, specmoeoff.batch"
    )
    assert not (HEAVY | {"typer", "click", "rich", "pydantic"}) & modules


def test_the_public_names_are_all_there() -> None:
    assert set(specmoeoff.__all__) <= set(dir(specmoeoff))
    for name in ("EngineConfig", "Policy", "RequestOutput", "SamplingParams", "SpeculativeConfig"):
        assert getattr(specmoeoff, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'LLN'"):
        specmoeoff.LLN  # noqa: B018
