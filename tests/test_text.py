"""Tokenizer, chat template and detokenizer, over small tokenizers of every decoder's kind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from specmoeoff.errors import CheckpointError, InvalidInputError
from specmoeoff.sampling_params import SamplingParams
from specmoeoff.stop_strings import StopStrings
from specmoeoff.text import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

LINES = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on",
    "def f(x):\n    return x + 1  # naïve façade — über",
    "日本語のテキスト 🙂🙃 emoji 👩‍👩‍👧 and so on",
] * 4
SPECIAL = ["<s>", "</s>", "<|user|>"]


def with_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return backend


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return with_special(backend)


def sentencepiece() -> tokenizers.Tokenizer:
    """Return what Llama 2 and Mistral have: byte fallback, and the first space stripped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += ["▁the", "▁a", "a", "b", "é", "日", "▁dog", "s", ".", "▁▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return with_special(backend)


def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    return with_special(backend)


def word_pieces() -> tokenizers.Tokenizer:
    words = ["[UNK]", "the", "dog", "##s", "##ly", ".", ",", "don", "'", "t", "is"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return with_special(backend)


def whole_words() -> tokenizers.Tokenizer:
    """Return a tokenizer without a decoder: tokens are joined with spaces."""
    vocab = {word: i for i, word in enumerate(["the", "dog", "sleeps", "�"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="the"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return with_special(backend)


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "word_pieces": word_pieces,
    "whole_words": whole_words,
}
_built: dict[str, Tokenizer] = {}


def build(kind: str) -> Tokenizer:
    if kind not in _built:
        _built[kind] = Tokenizer(KINDS[kind](), {}, Path("nowhere"))
    return _built[kind]


def save(
    directory: Path, backend: tokenizers.Tokenizer, template: Any = None, **config: Any
) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


def grow(
    tokenizer: Tokenizer,
    prompt: list[int],
    output: list[int],
    sizes: list[int] | None = None,
    **params: Any,
) -> tuple[list[str], int, str | None]:
    """Return the increments (flushed at the end), the tokens used, and the stop string."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(max_tokens=None, **params))
    increments, used, rest = [], 0, list(output)
    for size in [*(sizes or []), *[1] * len(output)]:
        piece, rest = rest[:size], rest[size:]
        text, consumed, stop = detokenizer.append(piece)
        increments.append(text)
        used += consumed
        if stop is not None:
            assert detokenizer.flush() == ""
            return increments, used, stop
    return [*increments, detokenizer.flush()], used, None


def whole_text(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    """Return the text that the output adds to the prompt, by decoding everything twice."""
    shown = [i for i in prompt if not tokenizer.is_silent(i, skip)]
    before = tokenizer.decode(shown, False)
    # What the prompt has for certain: all but the bytes of a character that is not complete.
    certain = shown
    while len(shown) - len(certain) < 3 and certain and certain[-1] in tokenizer.byte_ids:
        if not tokenizer.decode(certain, False).endswith("�"):
            break
        certain = certain[:-1]
    num_given = len(tokenizer.decode(certain, False).removesuffix("�"))
    text = tokenizer.decode([*prompt, *output], skip)
    return text[num_given:].removeprefix(before[num_given:])


@st.composite
def runs(draw: st.DrawFn) -> tuple[Tokenizer, list[int], list[int]]:
    tokenizer = build(draw(st.sampled_from(sorted(KINDS))))
    # Beyond the vocabulary too: models have padded rows. Special tokens come often.
    size = tokenizer.vocab_size
    token = st.one_of(st.integers(0, size + 3), st.integers(size - 4, size - 1))
    if tokenizer.byte_ids:
        token = st.one_of(token, st.sampled_from(sorted(tokenizer.byte_ids)))
    prompt = draw(st.lists(token, max_size=30))
    return tokenizer, prompt, draw(st.lists(token, max_size=80))


@settings(max_examples=300)
@given(runs(), st.booleans(), st.lists(st.integers(0, 9), max_size=20))
def test_increments_add_up_to_the_whole(
    run: tuple[Tokenizer, list[int], list[int]], skip: bool, sizes: list[int]
) -> None:
    tokenizer, prompt, output = run
    increments, used, stop = grow(tokenizer, prompt, output, sizes, skip_special_tokens=skip)
    assert "".join(increments) == whole_text(tokenizer, prompt, output, skip)
    assert (used, stop) == (len(output), None)


@given(st.text(max_size=60), st.sampled_from(["byte_level", "sentencepiece"]))
@example("🙂🙃 日本語 é", "sentencepiece")
def test_encoded_text_comes_back_and_is_never_cut_within_a_character(text: str, kind: str) -> None:
    tokenizer = build(kind)
    ids = tokenizer.encode(text)
    increments, _, _ = grow(tokenizer, [], ids, skip_special_tokens=False)
    assert "".join(increments) == tokenizer.decode(ids, skip_special_tokens=False)
    if "�" not in text and "▁" not in text:
        assert "".join(increments) == text
        assert not any("�" in increment for increment in increments)


def test_halves_of_an_emoji_are_held_back() -> None:
    tokenizer = build("byte_level")
    ids = [tokenizer.encode(c)[0] for c in "ab"]
    emoji = tokenizer.encode("🐢")
    assert len(emoji) > 1
    increments, _, _ = grow(tokenizer, [], [ids[0], *emoji, ids[1]])
    assert increments == ["a", *[""] * (len(emoji) - 1), "🐢", "b", ""]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tokenizer = build("byte_level")
    increments, _, _ = grow(tokenizer, [], tokenizer.encode("a🐢")[:-1])
    assert "".join(increments) == "a�"


def test_a_prompt_cut_within_a_character_gives_it_to_the_output() -> None:
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = build(kind)
        ids = tokenizer.encode("a🐢b")
        increments, _, _ = grow(tokenizer, ids[:-2], ids[-2:])
        assert "".join(increments) == "🐢b"


def test_a_prompt_may_end_in_a_long_run_of_bytes() -> None:
    tokenizer = build("sentencepiece")
    ids = tokenizer.encode("a🐢🐢🐢🐢🐢b")
    for cut in range(2, len(ids)):
        increments, _, _ = grow(tokenizer, ids[:cut], ids[cut:])
        # Only complete characters belong to the prompt.
        num_bytes = cut - ids.index(tokenizer.encode("a")[-1]) - 1
        assert "".join(increments) == "🐢" * (5 - num_bytes // 4) + "b"


def test_ids_without_a_token_leave_no_trace() -> None:
    tokenizer = build("sentencepiece")
    the, dog = (tokenizer._backend.token_to_id(piece) for piece in ("▁the", "▁dog"))
    padding = [tokenizer.vocab_size + 7] * 20
    assert "".join(grow(tokenizer, [], [the, *padding, dog])[0]) == "the dog"
    assert "".join(grow(tokenizer, [the, *padding], [dog])[0]) == " dog"


def test_the_first_space_depends_on_the_prompt() -> None:
    tokenizer = build("sentencepiece")
    the, dog = (tokenizer._backend.token_to_id(piece) for piece in ("▁the", "▁dog"))
    assert grow(tokenizer, [], [the, dog])[0] == ["the", " dog", ""]
    assert grow(tokenizer, [the], [dog, dog])[0] == [" dog", " dog", ""]
    # A special token before it is no text, so nothing needs separating.
    special = tokenizer._backend.token_to_id("<s>")
    assert grow(tokenizer, [special], [dog])[0] == ["dog", ""]


def test_text_without_end_stays_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build("byte_level")
    lengths: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        lengths.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    # A continuation byte never completes anything: the worst case for held back text.
    for token in (tokenizer.encode("a")[0], tokenizer.encode("🐢")[-1]):
        lengths.clear()
        grow(tokenizer, [token] * 5000, [token] * 1000)
        assert max(lengths) < 20
        assert len(lengths) < 1300


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Return end and begin of the first stop string, found character by character."""
    for end in range(1, len(text) + 1):
        begins = [end - len(s) for s in stops if text[:end].endswith(s)]
        if begins:
            return end, min(begins)
    return None


stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3)


@given(st.text("abc", max_size=40), stop_lists, st.lists(st.integers(1, 6), max_size=40))
def test_stop_strings_agree_with_a_search_of_the_whole(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    finder, given_out, found, rest = StopStrings(stops, False), "", None, text
    for size in [*sizes, *[1] * len(text)]:
        piece, rest = rest[:size], rest[size:]
        new, found = finder.release(piece, may_stop=True)
        given_out += new
        assert text.startswith(given_out)
        if found is not None:
            break
        # Nothing given out may be needed for a stop string, and nothing else is held back.
        held = text[len(given_out) : len(text) - len(rest)]
        assert not held or any(stop.startswith(held) for stop in stops)
    expected = first_stop(text, stops)
    if expected is None:
        assert found is None
        assert given_out + finder.rest() == text
    else:
        end, begin = expected
        assert (given_out, found) == (text[:begin], text[begin:end])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("sizes", [[], [2], [3, 4], [99]])
def test_a_stop_string_over_several_tokens_ends_the_text(include: bool, sizes: list[int]) -> None:
    tokenizer = build("byte_level")
    head, stop, tail = "x y ", "<END>", " never seen"
    ids = [i for c in head + stop + tail for i in tokenizer.encode(c)]
    increments, used, found = grow(
        tokenizer, [], ids, sizes, stop=["nope", stop], include_stop_str_in_output=include
    )
    assert "".join(increments) == head + (stop if include else "")
    assert (used, found) == (len(head + stop), stop)


def test_text_that_may_become_a_stop_string_waits() -> None:
    tokenizer = build("byte_level")
    ids = [i for c in "a##b###" for i in tokenizer.encode(c)]
    increments, used, stop = grow(tokenizer, [], ids, stop="###")
    assert increments == ["a", "", "", "##b", "", "", ""]
    assert (used, stop) == (7, "###")
    assert "".join(grow(tokenizer, [], ids[:6], stop="###")[0]) == "a##b##"


def test_stop_strings_wait_for_the_minimum_length() -> None:
    tokenizer = build("byte_level")
    ids = [i for c in "ab-ab-ab" for i in tokenizer.encode(c)]
    assert grow(tokenizer, [], ids, stop="ab", min_tokens=2)[1:] == (5, "ab")
    # One that ends after the minimum counts, wherever it began.
    assert grow(tokenizer, [], ids, stop="ab", min_tokens=1)[1:] == (2, "ab")
    increments, used, _ = grow(tokenizer, [], ids, stop="ab", min_tokens=6)
    assert ("".join(increments), used) == ("ab-ab-", 8)


def test_what_was_held_back_before_the_minimum_is_not_searched_again() -> None:
    finder = StopStrings(["ab", "xaby"], include_in_output=False)
    assert finder.release("xab", may_stop=False) == ("", None)
    assert finder.release("z", may_stop=True) == ("xabz", None)
    assert finder.release("xab", may_stop=False) == ("", None)
    assert finder.release("y", may_stop=True) == ("", "xaby")


def test_a_stop_string_in_what_was_held_back_is_cut_too() -> None:
    tokenizer = build("sentencepiece")
    ids = tokenizer.encode("a🐢")
    assert "".join(grow(tokenizer, [], ids, stop="🐢")[0]) == "a"


def test_special_tokens_show_when_asked_for() -> None:
    tokenizer = build("byte_level")
    ids = [*tokenizer.encode("a"), tokenizer._backend.token_to_id("</s>")]
    assert "".join(grow(tokenizer, [], ids)[0]) == "a"
    assert "".join(grow(tokenizer, [], ids, skip_special_tokens=False)[0]) == "a</s>"


def test_token_text_has_the_leading_space() -> None:
    for kind, piece in (("sentencepiece", "▁dog"), ("metaspace", "▁the")):
        tokenizer = build(kind)
        token_id = tokenizer._backend.token_to_id(piece)
        assert tokenizer.token_text(token_id) == piece.replace("▁", " ")
    tokenizer = build("byte_level")
    assert tokenizer.token_text(tokenizer.encode(" the")[0]) == " the"
    assert tokenizer.token_text(tokenizer._backend.token_to_id("<s>")) == "<s>"
    assert tokenizer.token_text(10**6) == ""


def test_nothing_to_load_is_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


def test_loading_knows_special_tokens(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    tokenizer = load(save(tmp_path, byte_level(), **config))
    assert tokenizer.eos_token_id == tokenizer._backend.token_to_id("</s>")
    assert {tokenizer.token_text(i) for i in tokenizer.special_ids} == set(SPECIAL)


def test_special_tokens_map_fills_in(tmp_path: Path) -> None:
    save(tmp_path, byte_level())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|user|>"}}')
    tokenizer = load(tmp_path)
    assert tokenizer.eos_token_id == tokenizer._backend.token_to_id("<|user|>")


def test_bos_comes_from_the_post_processor_alone(tmp_path: Path) -> None:
    backend = byte_level()
    plain = load(save(tmp_path, backend, bos_token="<s>", add_bos_token=True))
    assert plain.encode("the") == plain.encode("the", add_special_tokens=False)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer = load(save(tmp_path, backend))
    assert tokenizer.encode("the") == [bos, *tokenizer.encode("the", add_special_tokens=False)]


def test_limits_of_training_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=50)
    assert len(load(save(tmp_path, backend)).encode("a b c d e f")) == len(
        byte_level().encode("a b c d e f").ids
    )


def test_tokens_only_the_config_knows_are_added(tmp_path: Path) -> None:
    backend = byte_level()
    size, tool = backend.get_vocab_size(), backend.token_to_id("<tool>")
    added = {
        str(size): {"content": "<new>", "special": True},
        str(tool): {"content": "<tool>", "special": True},
    }
    tokenizer = load(save(tmp_path, backend, added_tokens_decoder=added))
    assert tokenizer.encode("a<new>")[-1] == size
    assert {size, tool} <= tokenizer.special_ids
    assert tokenizer.decode([tool, size]) == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a list"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9999": {"content": "<x>"}}}',
            "says that token 9999 is '<x>', but tokenizer.json gives it",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9999": {}}}',
            "gives added token 9999 no content",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    save(tmp_path, byte_level())
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ab\ud83d", "half a surrogate pair, '\\ud83d', at character 2"), (5, "the prompt is 5")],
)
def test_text_that_cannot_be_encoded_is_refused(text: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        build("byte_level").encode(text)


CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message['role'] == 'system' and not loop.first %}\n"
    "        {{ raise_exception('system must come first') }}\n"
    "    {%- endif %}\n"
    "<|user|>{{ message.role }}\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": 'Why <b>&"é"?'},
]


def chat_tokenizer(directory: Path, template: Any) -> Tokenizer:
    return load(save(directory, byte_level(), template, bos_token="<s>", eos_token="</s>"))


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}{{ m | tojson }} {{ m.content | tojson(indent=2) }}\n{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "  {% generation %}\n  {{ m.content }}{% endgeneration %}{% endfor %}\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}{{ strftime_now('%Y') }}{{ tools is none }}{{ pad_token }}",
    ],
)
def test_templates_render_as_transformers_does(
    tmp_path: Path, template: str, add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = chat_tokenizer(tmp_path, template)
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
    expected = oracle.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt) == expected
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt)
    assert ids == oracle.encode(expected, add_special_tokens=False)


def test_the_template_file_comes_before_the_config(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    assert chat_tokenizer(tmp_path, named).render_chat(MESSAGES) == "default"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].role }}")
    assert load(tmp_path).render_chat(MESSAGES) == "user"


def test_special_tokens_of_a_template_are_single_tokens(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "{{ bos_token }}{{ messages[0].content }}")
    bos = tokenizer._backend.token_to_id("<s>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}])[0] == bos


def test_text_parts_are_joined(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert tokenizer.render_chat([{"role": "user", "content": parts}]) == "a\nb"


def test_no_template_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"has no chat template .* prompt as text"):
        chat_tokenizer(tmp_path, None).apply_chat_template(MESSAGES)


def test_a_broken_template_is_the_checkpoints_fault(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not valid Jinja"):
        chat_tokenizer(tmp_path, "{% for %}").apply_chat_template(MESSAGES)


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    message = re.escape("(roles: user, system): system must come first")
    with pytest.raises(InvalidInputError, match=message):
        tokenizer.apply_chat_template(MESSAGES[::-1])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_templates_cannot_reach_out_or_crash(tmp_path: Path, attack: str) -> None:
    with pytest.raises(InvalidInputError, match="the chat template refuses the messages"):
        chat_tokenizer(tmp_path, attack).apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is []; it must be a list"),
        ("hello", "messages is 'hello'; it must be a list"),
        ({"role": "user"}, "it must be a list"),
        (["hi"], "message 0 is 'hi'; it must be an object"),
        ([{"content": "a"}], "message 0 has role None; it must be a string"),
        ([MESSAGES[0], {"role": 3, "content": "a"}], "message 1 has role 3"),
        ([{"role": "user"}], "message 0 (role 'user') has content None"),
        ([{"role": "user", "content": 5}], "message 0 (role 'user') has content 5"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a list of parts with a text each"),
    ],
)
def test_malformed_messages_are_quoted(tmp_path: Path, messages: Any, message: str) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        tokenizer.apply_chat_template(messages)


def test_importing_text_is_light() -> None:
    code = (
        "import sys, specmoeoff.text;"
        "print([m for m in ('tokenizers', 'jinja2', 'transformers', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
