"""One result line of a job, as plain data and as the bytes that are written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from specmoeoff.batch.lines import JobLine
    from specmoeoff.outputs import CompletionOutput, Logprob, RequestOutput

# Stands for minus infinity, which JSON cannot write.
_LEAST_LOGPROB = -9999.0


def result_record(line: JobLine, output: RequestOutput) -> dict[str, Any]:
    """Return a finished request's record.

    ``text``, ``token_ids``, ``finish_reason`` and ``num_tokens`` are those of sample 0; with
    ``n > 1`` the list ``outputs`` has them for every sample.
    """
    if output.error is not None:
        return error_record(line, output.error)
    samples = [_sample(sample) for sample in sorted(output.outputs, key=lambda o: o.index)]
    record: dict[str, Any] = {"id": line.id, "index": line.index, **samples[0]}
    record["num_prompt_tokens"] = len(output.prompt_token_ids)
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [_logprobs(at) for at in output.prompt_logprobs]
    if len(samples) > 1:
        record["outputs"] = [{"index": i, **sample} for i, sample in enumerate(samples)]
    return record


def error_record(line: JobLine, error: str) -> dict[str, Any]:
    """Return the record of a line that could not be run."""
    return {"id": line.id, "index": line.index, "error": error}


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return one line of JSON in UTF-8, newline included."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # An id with an unpaired surrogate: only its escape can be written.
        return json.dumps(record).encode() + b"\n"


def _sample(sample: CompletionOutput) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "num_tokens": len(sample.token_ids),
    }
    if sample.logprobs is not None:
        fields["logprobs"] = [_logprobs(at) for at in sample.logprobs]
    return fields


def _logprobs(at: Mapping[int, Logprob] | None) -> dict[str, dict[str, Any]] | None:
    if at is None:
        return None
    return {
        str(token_id): {
            "logprob": max(entry.logprob, _LEAST_LOGPROB),
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token_id, entry in at.items()
    }
