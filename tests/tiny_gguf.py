"""Writes a tiny llama-architecture GGUF with the three element types that the demo reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np

from specmoeoff.demo.noise import DEVIATION, centred_sums

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS = 3, 64, 96, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "a n", "i n", "Ġ a"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)

Q4_1, Q8_0, F32 = (getattr(gguf.GGMLQuantizationType, n) for n in ("Q4_1", "Q8_0", "F32"))


def byte_tokens() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE is written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def write_tiny_gguf(path: Path) -> None:
    """Write the model; its values are the same everywhere."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(_tokens()))
    _add_tokenizer(writer)

    head_dim = HIDDEN // HEADS
    _add(writer, "token_embd.weight", (len(_tokens()), HIDDEN), Q8_0, 1.0)
    _add(writer, "output_norm.weight", (HIDDEN,), F32, 0.1, 1.0)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            _add(writer, f"{prefix}{name}.weight", (HIDDEN,), F32, 0.1, 1.0)
        shapes = {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * head_dim, HIDDEN),
            "attn_v": (KV_HEADS * head_dim, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        for name, shape in shapes.items():
            _add(writer, f"{prefix}{name}.weight", shape, Q4_1, shape[1] ** -0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokens() -> list[str]:
    return [*SPECIAL, *byte_tokens(), *(merge.replace(" ", "") for merge in MERGES)]


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = _tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    shape: tuple[int, ...],
    kind: gguf.GGMLQuantizationType,
    spread: float,
    mean: float = 0.0,
) -> None:
    values = centred_sums(int(np.prod(shape)), *name.encode()).reshape(shape)
    values = (values * np.float32(spread / DEVIATION) + np.float32(mean)).astype(np.float32)
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
