"""Hypothesis profiles, and the tiny checkpoints that many tests share (never written to)."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from specmoeoff import kernels
from tiny import write_draft, write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A busy machine makes single examples slow, so nothing is judged by time.
_QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=_QUIET)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A shell starts what it runs in the background with SIGINT ignored, which is inherited: tests of
# Ctrl-C would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def kernel_settings() -> Iterator[None]:
    """Leave the CPU target and the number of threads as they were."""
    target, threads = kernels.cpu_target(), kernels.num_threads()
    yield
    kernels.use_cpu_target(target)
    kernels.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Mixtral of 2 layers and 5 experts (3 per token) with a byte tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "mixtral"
    return write_tiny(directory, "mixtral", seed=1, expert_spread=0.1, tokenizer=True)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama of 2 layers with a byte tokenizer; agrees with nothing but itself."""
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    return write_tiny(directory, "llama", seed=2, tokenizer=True)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Mistral with a sliding window of 16 tokens and a byte tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "mistral"
    return write_tiny(directory, "mistral", seed=3, sliding_window=16, tokenizer=True)


@pytest.fixture(scope="session")
def wide_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide keys and few experts: the KV cache is what fills a budget (144 KiB a page)."""
    return write_tiny(
        tmp_path_factory.mktemp("wide") / "target",
        seed=21,
        expert_spread=0.1,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=96,
        intermediate_size=96,
    )


@pytest.fixture(scope="session")
def wide_draft(wide_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense draft for ``wide_target``."""
    return write_draft(wide_target, tmp_path_factory.mktemp("wide") / "draft")


@pytest.fixture(scope="session")
def tiny_draft(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense draft for ``tiny_mixtral``, which agrees with about four tokens in five."""
    return write_draft(tiny_mixtral, tmp_path_factory.mktemp("tiny") / "draft", tokenizer=True)
