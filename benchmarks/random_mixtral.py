"""Write a Mixtral of any size with random weights, tensor by tensor, so that it may exceed memory.

Weights are normal with standard deviation 0.02, stored as bfloat16; routing is near uniform, which
is the worst case for whoever hopes that experts stay. It says nothing worth reading.

    python benchmarks/random_mixtral.py DIR --hidden 2048 --intermediate 5632 --layers 16
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff import kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    """Write the files and say how large they are."""
    options = _options()
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "config.json").write_text(json.dumps(_config(options), indent=2))
    rng = np.random.default_rng(options.seed)
    weight_map: dict[str, str] = {}
    total = 0
    for file, shapes in _shards(options):
        total += _write(options.directory / file, shapes, rng)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{options.directory}: {total / 1e9:.2f} GB")


def _write(path: Path, shapes: Shapes, rng: np.random.Generator) -> int:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            if name.endswith("norm.weight"):
                values += 1
            file.write(kernels.to_bfloat16(values).tobytes())
    return at


def _shards(options: argparse.Namespace) -> Iterator[tuple[str, Shapes]]:
    """Yield a file for each layer, and one for what is of no layer."""
    hidden, table = options.hidden, (options.vocabulary, options.hidden)
    count = options.layers + 1
    yield (
        f"model-00001-of-{count:05}.safetensors",
        {
            "model.embed_tokens.weight": table,
            "model.norm.weight": (hidden,),
            "lm_head.weight": table,
        },
    )
    wide, narrow = options.heads * options.head_dim, options.kv_heads * options.head_dim
    for layer in range(options.layers):
        prefix = f"model.layers.{layer}"
        shapes: Shapes = {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (wide, hidden),
            f"{prefix}.self_attn.k_proj.weight": (narrow, hidden),
            f"{prefix}.self_attn.v_proj.weight": (narrow, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, wide),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.block_sparse_moe.gate.weight": (options.experts, hidden),
        }
        for expert in range(options.experts):
            where = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes[f"{where}.w1.weight"] = (options.intermediate, hidden)
            shapes[f"{where}.w2.weight"] = (hidden, options.intermediate)
            shapes[f"{where}.w3.weight"] = (options.intermediate, hidden)
        yield f"model-{layer + 2:05}-of-{count:05}.safetensors", shapes


def _config(options: argparse.Namespace) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "num_local_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
