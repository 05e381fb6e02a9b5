"""LLM: prompts in, outputs out. The door for Python users.

Turns text, messages or token ids into requests, drives the engine's steps, and turns what comes
out into RequestOutputs. One request that cannot run carries its error; the others go on.
"""

from __future__ import annotations

import operator
import reprlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

from specmoeoff.config import EngineConfig, SpeculativeConfig
from specmoeoff.engine.build import build_engine
from specmoeoff.errors import InvalidInputError
from specmoeoff.memory_size import parse_memory_size
from specmoeoff.models.generation_config import sampling_defaults
from specmoeoff.offload.hub import resolve_model
from specmoeoff.outputs import CompletionOutput, RequestMetrics, RequestOutput
from specmoeoff.sampling_params import SamplingParams
from specmoeoff.text import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from types import TracebackType

    from specmoeoff.config import Dtype, ExpertMode, KvDtype, Policy
    from specmoeoff.engine.commit import Update
    from specmoeoff.engine.sequence import Request
    from specmoeoff.engine.sequence import Sequence as EngineSequence
    from specmoeoff.engine.stats import EngineStats

Prompt = str | Mapping[str, Any]
"""Text, or a mapping with one of ``prompt``, ``prompt_token_ids`` and ``messages``."""
Params = SamplingParams | Iterable[SamplingParams] | None


class LLM:
    """A mixture-of-experts model under a memory budget, ready to generate.

    Example:
        >>> llm = LLM("path/to/mixtral", memory="1GiB")
        >>> out = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=32))
        >>> out[0].outputs[0].text
    """

    def __init__(
        self,
        model: str,
        *,
        memory: str | int | None = None,
        device: str = "auto",
        device_memory: str | int | None = None,
        schedule: str = "auto",
        num_micro_batches: int = 2,
        dtype: Literal["auto"] | Dtype = "float32",
        kv_dtype: KvDtype = "bfloat16",
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        expert_mode: ExpertMode = "auto",
        cpu_target: str | None = None,
        seed: int = 0,
        speculative_config: SpeculativeConfig | None = None,
    ) -> None:
        """Open a model; the options are EngineConfig's.

        Raises:
            CheckpointError: The model or its draft cannot be used.
            DoesNotFitError: The budget is too small; the message has the arithmetic.
            InvalidInputError: An option has a value that cannot be used.
        """
        self.config = EngineConfig(
            model=str(model),
            memory=None if memory is None else parse_memory_size(memory),
            device=device,  # type: ignore[arg-type]  # EngineConfig refuses what it does not know
            device_memory=None if device_memory is None else parse_memory_size(device_memory),
            schedule=schedule,
            num_micro_batches=num_micro_batches,
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_threads=num_threads,
            expert_mode=expert_mode,
            cpu_target=cpu_target,
            seed=seed,
            speculative=speculative_config,
        )
        directory = resolve_model(self.config.model)
        # Before the engine plans: what the tokenizer holds is part of the process.
        self.tokenizer = Tokenizer.load(directory)
        self.default_sampling_params = SamplingParams(**sampling_defaults(directory))
        """What the checkpoint's generation_config.json recommends."""
        self._engine = build_engine(self.config)
        self._inboxes: dict[Request, deque[Update]] = {}
        """Where the updates of each open request go: to the run that it belongs to."""
        self._is_closed = False

    @property
    def policy(self) -> Policy:
        """The memory split and limits that were chosen."""
        return self._engine.policy

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs are in the prompts' order.

        Args:
            prompts: One prompt or several.
            sampling_params: For all, or one per prompt; None is what the checkpoint recommends.
            progress: Show a progress bar on standard error.

        Raises:
            InvalidInputError: There are not as many parameters as prompts.
            StreamError: Weights could not be read.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = _params_list(sampling_params, len(several))
        outputs: list[RequestOutput | None] = [None] * len(several)
        for output in _with_progress(self.iter_completed(several, params), len(several), progress):
            outputs[int(output.request_id)] = output
        return [output for output in outputs if output is not None]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Params = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of {"role", "content"}."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [messages] if single else list(messages)
        prompts: list[Prompt] = [{"messages": conversation} for conversation in conversations]
        return self.generate(prompts, sampling_params, progress=progress)

    def iter_completed(
        self, prompts: Iterable[Prompt], sampling_params: Params = None
    ) -> Iterator[RequestOutput]:
        """Yield requests as they finish; ``request_id`` is the prompt's index as text.

        Prompts are taken as room appears, so an endless iterable is fine.
        """
        with closing(self._run(prompts, sampling_params)) as run:
            for item in run:
                if isinstance(item, RequestOutput):
                    yield item
                elif item.ends_request:
                    yield _output(item.sequence.request)

    def generate_stream(
        self, prompts: Prompt | Iterable[Prompt], sampling_params: Params = None
    ) -> Iterator[RequestOutput]:
        """Yield increments: each output holds what one sample gained since its last one.

        The last increment of a request has ``finished`` set.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
        with closing(self._run(several, sampling_params)) as run:
            for item in run:
                yield item if isinstance(item, RequestOutput) else _increment(item)

    def stats(self) -> EngineStats:
        """Return counters and seconds since the start."""
        return self._engine.stats()

    def close(self) -> None:
        """Stop reading; the LLM cannot generate afterwards."""
        self._is_closed = True
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self, prompts: Iterable[Prompt], sampling_params: Params
    ) -> Generator[RequestOutput | Update, None, None]:
        """Feed prompts and step until all are done; yield refusals and updates as they come."""
        if self._is_closed:
            raise InvalidInputError("this LLM was closed; make a new one")
        feed = enumerate(_pairs(prompts, sampling_params or self.default_sampling_params))
        inbox: deque[Update] = deque()
        open_requests: set[Request] = set()
        exhausted = False
        try:
            while True:
                while not exhausted and self._engine.wants_more:
                    entry = next(feed, None)
                    if entry is None:
                        exhausted = True
                        break
                    index, (prompt, params) = entry
                    added = self._add(str(index), prompt, params)
                    if isinstance(added, RequestOutput):
                        yield added
                    else:
                        open_requests.add(added)
                        self._inboxes[added] = inbox
                if exhausted and not open_requests:
                    return
                if not inbox:
                    self._step()
                while inbox:
                    update = inbox.popleft()
                    if update.ends_request:
                        self._forget(update.sequence.request, open_requests)
                    yield update
        finally:
            for request in list(open_requests):
                self._forget(request, open_requests)
                self._engine.abort(request)

    def _step(self) -> None:
        """Step for every run there is: one may be going on while another one started."""
        for update in self._engine.step():
            inbox = self._inboxes.get(update.sequence.request)
            if inbox is not None:
                inbox.append(update)

    def _forget(self, request: Request, open_requests: set[Request]) -> None:
        open_requests.discard(request)
        del self._inboxes[request]

    def _add(
        self, request_id: str, prompt: Prompt, params: SamplingParams
    ) -> Request | RequestOutput:
        """Queue one prompt, or return the output that says why it cannot run."""
        text: str | None = None
        token_ids: list[int] = []
        try:
            text, token_ids = self._tokens(prompt)
            return self._engine.add_request(
                request_id,
                token_ids,
                params,
                prompt=text,
                make_detokenizer=lambda: self._detokenizer(token_ids, params),
                token_text=self.tokenizer.token_text if self.tokenizer else None,
            )
        except InvalidInputError as error:
            metrics = RequestMetrics(arrival_time=0.0)
            return RequestOutput(request_id, text, token_ids, [], True, metrics, error=str(error))

    def _detokenizer(self, token_ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            if params.stop:
                raise InvalidInputError(
                    f"stop {params.stop!r} needs a tokenizer, and {self.config.model} has none"
                )
            return None
        return Detokenizer(self.tokenizer, token_ids, params)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return a prompt's text, where it has one, and its token ids."""
        if not isinstance(prompt, (str, Mapping)):
            raise InvalidInputError(
                f"a prompt is {reprlib.repr(prompt)}; it must be text, or a mapping with one of "
                f"prompt, prompt_token_ids and messages"
            )
        given = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        kinds = [kind for kind in ("prompt", "prompt_token_ids", "messages") if kind in given]
        if len(kinds) != 1:
            raise InvalidInputError(
                f"a prompt needs exactly one of prompt, prompt_token_ids and messages; "
                f"this one has {', '.join(sorted(given)) or 'nothing'}"
            )
        value = given[kinds[0]]
        if kinds[0] == "prompt_token_ids":
            return None, _token_ids(value)
        if self.tokenizer is None:
            raise InvalidInputError(
                f"{self.config.model} has no tokenizer.json: give prompt_token_ids, not {kinds[0]}"
            )
        if kinds[0] == "messages":
            return None, self.tokenizer.apply_chat_template(value)  # type: ignore[arg-type]  # it checks
        if not isinstance(value, str):
            raise InvalidInputError(f"prompt is {value!r}; it must be text")
        return value, self.tokenizer.encode(value)


def _token_ids(value: object) -> list[int]:
    """Return token ids as plain integers, whatever kind of integers they came as."""
    try:
        return [operator.index(token_id) for token_id in value]  # type: ignore[attr-defined]
    except TypeError:
        raise InvalidInputError(
            f"prompt_token_ids is {reprlib.repr(value)}; it must be a list of token ids"
        ) from None


def _pairs(
    prompts: Iterable[Prompt], sampling_params: SamplingParams | Iterable[SamplingParams]
) -> Iterator[tuple[Prompt, SamplingParams]]:
    if isinstance(sampling_params, SamplingParams):
        return zip(prompts, repeat(sampling_params), strict=False)
    return zip(prompts, sampling_params, strict=False)


def _params_list(
    sampling_params: Params, count: int
) -> SamplingParams | list[SamplingParams] | None:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return sampling_params
    params = list(sampling_params)
    if len(params) != count:
        raise InvalidInputError(f"{len(params)} sampling_params for {count} prompts: give one each")
    return params


def _output(request: Request) -> RequestOutput:
    """Return a finished request as a whole."""
    outputs = [
        CompletionOutput(
            index=sequence.index,
            text=sequence.text,
            token_ids=sequence.output_token_ids,
            cumulative_logprob=_cumulative(sequence),
            logprobs=sequence.logprobs if request.params.logprobs is not None else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
        for sequence in request.sequences
    ]
    return _request_output(request, outputs, finished=True)


def _increment(update: Update) -> RequestOutput:
    """Return what an update added to its sequence."""
    sequence = update.sequence
    request = sequence.request
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = sequence.logprobs[len(sequence.logprobs) - len(update.token_ids) :]
    output = CompletionOutput(
        index=sequence.index,
        text=update.text,
        token_ids=update.token_ids,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
    return _request_output(request, [output], update.ends_request)


def _request_output(
    request: Request, outputs: list[CompletionOutput], finished: bool
) -> RequestOutput:
    metrics = RequestMetrics(
        arrival_time=request.arrival_time,
        first_scheduled_time=request.first_scheduled_time,
        first_token_time=request.first_token_time,
        finished_time=request.finished_time,
        num_drafted_tokens=request.num_drafted_tokens,
        num_accepted_tokens=request.num_accepted_tokens,
        num_preemptions=request.num_preemptions,
    )
    return RequestOutput(
        request.request_id,
        request.prompt,
        request.prompt_token_ids,
        outputs,
        finished,
        metrics,
        request.prompt_logprobs if finished else None,
    )


def _cumulative(sequence: EngineSequence) -> float | None:
    if sequence.request.params.logprobs is None:
        return None
    pairs = zip(sequence.logprobs, sequence.output_token_ids, strict=True)
    return sum(ranked[token_id].logprob for ranked, token_id in pairs)


def _with_progress(
    outputs: Iterator[RequestOutput], total: int, show: bool
) -> Iterator[RequestOutput]:
    if not show:
        yield from outputs
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total)
        for output in outputs:
            bar.advance(task)
            yield output
