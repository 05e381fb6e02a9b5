"""SamplingParams: what is refused, how it is said, and how fields are filled in."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from specmoeoff.errors import InvalidInputError
from specmoeoff.sampling_params import SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
    }


REFUSED: list[tuple[str, Any, str]] = [
    ("n", 0, "at least 1"),
    ("n", True, "an integer"),
    ("n", 1.0, "an integer"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", math.nan, "finite"),
    ("temperature", math.inf, "finite"),
    ("temperature", "1", "number"),
    ("temperature", None, "number"),
    ("temperature", True, "number"),
    ("top_p", 0.0, "above 0 to 1"),
    ("top_p", 1.01, "above 0 to 1"),
    ("top_p", math.nan, "above 0 to 1"),
    ("top_k", -2, "at least -1"),
    ("top_k", 3.5, "an integer"),
    ("min_p", -0.01, "0 to 1"),
    ("min_p", 1.5, "0 to 1"),
    ("repetition_penalty", 0.0, "above 0"),
    ("repetition_penalty", math.inf, "finite"),
    ("presence_penalty", 2.1, "-2 to 2"),
    ("frequency_penalty", -2.1, "-2 to 2"),
    ("seed", -1, "0 to 18446744073709551615, or None"),
    ("seed", 2**64, "0 to 18446744073709551615, or None"),
    ("seed", "7", "an integer"),
    ("max_tokens", 0, "at least 1, or None"),
    ("min_tokens", -1, "at least 0"),
    ("min_tokens", None, "at least 0"),
    ("logprobs", -2, "at least -1"),
    ("logprobs", True, "an integer"),
    ("prompt_logprobs", "all", "an integer"),
    ("ignore_eos", 1, "true or false"),
    ("include_stop_str_in_output", None, "true or false"),
    ("skip_special_tokens", "no", "true or false"),
    ("stop", 5, "a string or a list of strings"),
    ("stop", b"x", "a string or a list of strings"),
    ("stop", "", "not empty"),
    ("stop", ["a", ""], "not empty"),
    ("stop", ["a", 3], "not empty"),
    ("stop_token_ids", "12", "a list of token ids"),
    ("stop_token_ids", 12, "a list of token ids"),
    ("stop_token_ids", [1, -3], "an integer, 0 to 2147483647"),
    ("stop_token_ids", [2**31], "an integer, 0 to 2147483647"),
    ("stop_token_ids", [True], "an integer"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_refusals_quote_the_field_and_the_allowed_range(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(allowed)) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    offending = value[-1] if isinstance(value, list) else value
    assert name in message
    assert repr(offending) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", np.float32(0.5)),
        ("top_p", 1),
        ("top_k", -1),
        ("top_k", np.int64(5)),
        ("min_p", 1.0),
        ("seed", 2**64 - 1),
        ("max_tokens", None),
        ("logprobs", 0),
        ("logprobs", -1),
        ("stop", "END"),
        ("stop", ("a", "b")),
        ("stop", []),
        ("stop_token_ids", (1, 2)),
    ],
)
def test_limits_of_the_range_are_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidInputError) as caught:
        SamplingParams(temperature="x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_fields_are_checked_against_each_other() -> None:
    with pytest.raises(InvalidInputError, match=r"min_tokens is 20; .* max_tokens, 16"):
        SamplingParams(min_tokens=20)
    assert SamplingParams(min_tokens=20, max_tokens=None).min_tokens == 20
    with pytest.raises(InvalidInputError, match="n is 2; it must be 1 when greedy"):
        SamplingParams(n=2, temperature=0.0)


def test_greedy_is_any_temperature_too_small_to_divide_by() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_stop_strings_is_a_tuple_whatever_was_given() -> None:
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_from_dict_takes_the_rest_from_the_defaults() -> None:
    defaults = SamplingParams(temperature=0.3, max_tokens=99)
    params = SamplingParams.from_dict({"max_tokens": 5, "seed": None}, defaults)
    assert (params.temperature, params.max_tokens) == (0.3, 5)
    assert defaults.max_tokens == 99
    assert SamplingParams.from_dict({}) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("max_token", "did you mean 'max_tokens'?"),
        ("Temperature", "did you mean 'temperature'?"),
        ("beam", "known ones: n, temp"),
    ],
)
def test_unknown_fields_are_refused_by_name(field: str, remedy: str) -> None:
    for build in (SamplingParams.from_dict, lambda d: SamplingParams().replace(**d)):
        with pytest.raises(InvalidInputError, match=re.escape(remedy)) as caught:
            build({field: 1})
        assert repr(field) in str(caught.value)


def test_from_dict_refuses_what_is_not_an_object() -> None:
    with pytest.raises(InvalidInputError, match="sampling parameters is"):
        SamplingParams.from_dict([("n", 1)])  # type: ignore[arg-type]


def test_replace_validates_and_leaves_the_original_alone() -> None:
    params = SamplingParams(seed=1)
    assert params.replace(seed=2).seed == 2
    assert params.seed == 1
    with pytest.raises(InvalidInputError, match="top_p is 7"):
        params.replace(top_p=7)


def test_every_field_is_documented_for_the_command_line() -> None:
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(SamplingParams)).body[0]
    assert isinstance(tree, ast.ClassDef)
    documented = {
        node.target.id
        for node, after in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert documented == {field.name for field in dataclasses.fields(SamplingParams)}
