"""Writes a Hugging Face Mixtral as a BF16 GGUF for llama.cpp, tensor by tensor.

Runs in the peers' environment, which has the gguf package. Each expert tensor of a layer is put
together in memory (E matrices, some 100 MB), written and forgotten. Refuses what it would get
wrong: scaled RoPE, biases, a tokenizer that is not byte-level BPE becomes none at all.

    python write_gguf.py CHECKPOINT OUTPUT.gguf
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
_NO_VOCAB = "no_vocab"
# The split of words is named after the model in GGUF; 49152 tokens is SmolLM's.
_PRE_TOKENIZERS = {49152: "smollm"}


class Checkpoint:
    """The tensors of a directory of safetensors, mapped."""

    def __init__(self, directory: Path) -> None:
        self._tensors: dict[str, tuple[Path, int, str, list[int]]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin = 8 + length + entry["data_offsets"][0]
                self._tensors[name] = (file, begin, entry["dtype"], entry["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape."""
        return self._tensors[name][3]

    def bf16(self, name: str) -> np.ndarray:
        """Return a tensor as bfloat16 bits, uint16."""
        array, dtype = self._map(name)
        return array if dtype == "BF16" else _round_to_bf16(array.astype(np.float32))

    def f32(self, name: str) -> np.ndarray:
        """Return a tensor as float32."""
        array, dtype = self._map(name)
        if dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)

    def _map(self, name: str) -> tuple[np.ndarray, str]:
        file, begin, dtype, shape = self._tensors[name]
        return np.memmap(file, _DTYPES[dtype], "r", begin, tuple(shape)), dtype


@dataclass(frozen=True)
class Entry:
    """One tensor of the GGUF and the checkpoint tensors it is made of."""

    name: str
    sources: tuple[str, ...]
    widen: bool = False
    """Stored as float32: norms and routers, as llama.cpp wants them."""
    merge: bool = False
    """The sources are stacked along a new first dimension."""
    num_heads: int = 0
    """Rows are reordered from halves to pairs in every head, llama.cpp's order for RoPE."""


def main() -> None:
    """Write the file under a temporary name and rename it at the end."""
    directory, output = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((directory / "config.json").read_text())
    _refuse_unsupported(config)
    checkpoint = Checkpoint(directory)
    entries = _entries(config, "lm_head.weight" in checkpoint)
    partial = output.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_parameters(writer, config)
    _add_tokenizer(writer, config, directory)
    for entry in entries:
        _announce(writer, checkpoint, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_data(checkpoint, entry))
    writer.close()
    partial.replace(output)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    scaling = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type")
    reasons = {
        f"model_type {config.get('model_type')!r}": config.get("model_type") != "mixtral",
        f"rope_type {scaling!r}": scaling not in (None, "default"),
        "a sliding window": bool(config.get("sliding_window")),
    }
    for reason, applies in reasons.items():
        if applies:
            raise SystemExit(f"config.json has {reason}, which this writer does not handle")


def _entries(config: dict[str, Any], has_head: bool) -> list[Entry]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    entries = [
        Entry("token_embd.weight", ("model.embed_tokens.weight",)),
        Entry("output_norm.weight", ("model.norm.weight",), widen=True),
    ]
    if has_head and not config.get("tie_word_embeddings"):
        entries.append(Entry("output.weight", ("lm_head.weight",)))
    for layer in range(config["num_hidden_layers"]):
        source, block = f"model.layers.{layer}", f"blk.{layer}"
        moe = f"{source}.block_sparse_moe"
        attention = f"{source}.self_attn"
        entries += [
            Entry(f"{block}.attn_norm.weight", (f"{source}.input_layernorm.weight",), widen=True),
            Entry(f"{block}.attn_q.weight", (f"{attention}.q_proj.weight",), num_heads=heads),
            Entry(f"{block}.attn_k.weight", (f"{attention}.k_proj.weight",), num_heads=kv_heads),
            Entry(f"{block}.attn_v.weight", (f"{attention}.v_proj.weight",)),
            Entry(f"{block}.attn_output.weight", (f"{attention}.o_proj.weight",)),
            Entry(
                f"{block}.ffn_norm.weight",
                (f"{source}.post_attention_layernorm.weight",),
                widen=True,
            ),
            Entry(f"{block}.ffn_gate_inp.weight", (f"{moe}.gate.weight",), widen=True),
        ]
        experts = range(config["num_local_experts"])
        for name, matrix in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            sources = tuple(f"{moe}.experts.{expert}.{matrix}.weight" for expert in experts)
            entries.append(Entry(f"{block}.ffn_{name}_exps.weight", sources, merge=True))
    return entries


def _add_parameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    writer.add_name("specmoeoff-benchmark")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def _add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any], directory: Path) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text()) if path.is_file() else {}
    pre_tokenizer = _PRE_TOKENIZERS.get(config["vocab_size"])
    if tokenizer.get("model", {}).get("type") != "BPE" or pre_tokenizer is None:
        # Enough for llama-batched-bench, which draws random token ids.
        writer.add_tokenizer_model(_NO_VOCAB)
        return
    size = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        types[added["id"]] = special
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _announce(writer: gguf.GGUFWriter, checkpoint: Checkpoint, entry: Entry) -> None:
    shape = checkpoint.shape(entry.sources[0])
    if entry.merge:
        shape = [len(entry.sources), *shape]
    kind = gguf.GGMLQuantizationType.F32 if entry.widen else gguf.GGMLQuantizationType.BF16
    dtype = np.dtype(np.float32 if entry.widen else np.uint16)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    writer.add_tensor_info(entry.name, shape, dtype, nbytes, raw_dtype=kind)


def _data(checkpoint: Checkpoint, entry: Entry) -> np.ndarray:
    if entry.widen:
        return checkpoint.f32(entry.sources[0])
    if entry.merge:
        return np.stack([checkpoint.bf16(source) for source in entry.sources])
    array = checkpoint.bf16(entry.sources[0])
    if entry.num_heads:
        halves = array.reshape(entry.num_heads, 2, -1, array.shape[-1])
        array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
    return array


def _round_to_bf16(array: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, ties to even; the weights are finite."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


if __name__ == "__main__":
    main()
