#!/usr/bin/env python3
"""Writes small GGUF files and what the `gguf` package reads in them.

usage: gguf_files.py            writes policy/testdata/gguf/*.gguf and expected.json
       gguf_files.py FILE DIR   compares a folder imported from FILE with --dtype f32 with the package's own reading

Blocks of the types that the package cannot make are random bytes with scales that are finite. Expected is, for each
parameter by its Hugging Face name, FNV-1a (64 bits) over its float32 elements in little-endian order, with the rows of
Llama's heads put back as transformers does (`reverse_permute_weights`) and Gemma's one taken off its norms.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize

TESTDATA = Path(__file__).resolve().parents[2] / "policy" / "testdata"

HIDDEN, HEADS, KV, HEAD_DIM = 32, 2, 1, 16

# Where the two-byte scales of a block lie.
SCALES = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_PARTS = PARTS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def blocks(random: np.random.Generator, shape: tuple[int, ...], kind: Q) -> np.ndarray:
    """The bytes of a tensor of one type."""
    values = random.normal(0, 0.5, shape).astype(np.float32)
    if kind not in SCALES:
        return quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = random.normal(0, 0.05, raw.shape[:2]).astype(np.float16)
        raw[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def hugging_face(architecture: str, name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{(GEMMA_PARTS if architecture == 'gemma3' else PARTS)[part]}.{kind}"


def as_published(architecture: str, name: str, values: np.ndarray, heads: int, kv: int) -> np.ndarray:
    """Values as they were before llama.cpp's conversion."""
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return values - np.float32(1)
    count = {"attn_q": heads, "attn_k": kv}.get(name.split(".")[-2])
    if architecture == "llama" and count:
        halves = values.reshape(count, values.shape[0] // count // 2, 2, *values.shape[1:])
        return halves.swapaxes(2, 1).reshape(values.shape)
    return values


def fnv(values: np.ndarray) -> str:
    digest = 0xCBF29CE484222325
    for byte in np.ascontiguousarray(values, dtype="<f4").tobytes():
        digest = ((digest ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


def write_vocabulary(writer: gguf.GGUFWriter, name: str, tokens: dict) -> None:
    ids = tokens["model"]["vocab"] | {token["content"]: token["id"] for token in tokens["added_tokens"]}
    added = {token["content"]: token for token in tokens["added_tokens"]}
    # An id without a piece is filled up as llama.cpp's conversion does.
    pieces = [f"[PAD{id}]" for id in range(1 + max(ids.values()))]
    for piece, id in ids.items():
        pieces[id] = piece

    def kind(piece: str) -> int:
        if piece in added:
            return 3 if added[piece]["special"] else 4
        if piece not in ids:
            return 5
        return 6 if name == "gemma" and piece.startswith("<0x") and len(piece) == 6 else 1

    writer.add_tokenizer_model("llama" if name == "gemma" else "gpt2")
    writer.add_tokenizer_pre({"gemma": "default", "llama": "llama-bpe", "qwen2": "qwen2"}[name])
    writer.add_token_list(pieces)
    writer.add_token_types([kind(piece) for piece in pieces])
    if name == "gemma":
        writer.add_token_scores([-1000.0 if kind(p) in (3, 4) else -float(id) for id, p in enumerate(pieces)])
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(True)
        writer.add_bos_token_id(pieces.index("<bos>"))
        writer.add_eos_token_id(pieces.index("<eos>"))
        writer.add_pad_token_id(pieces.index("<pad>"))
        writer.add_unk_token_id(pieces.index("<unk>"))
    else:
        writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
        writer.add_eos_token_id(pieces.index("<|eot_id|>" if name == "llama" else "<|im_end|>"))
        writer.add_bos_token_id(pieces.index("<|begin_of_text|>" if name == "llama" else "<|endoftext|>"))
    chat = {"gemma": "gemma-3", "llama": "llama-3.2", "qwen2": "qwen2.5"}[name]
    writer.add_chat_template((TESTDATA / "chat" / f"{chat}.jinja").read_text())


def llama3_factors() -> np.ndarray:
    """What llama.cpp's conversion writes for a scaling of Llama 3.1 with factor 8."""
    factors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 500_000.0 ** (2 * i / HEAD_DIM)
        low, high = 8192 / 1.0, 8192 / 4.0
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        middle = 1 / ((1 - smooth) / 8.0 + smooth)
        factors.append(1.0 if wavelength < high else 8.0 if wavelength > low else middle)
    return np.array(factors, dtype=np.float32)


def tensors(architecture: str, vocabulary: int, layers: int) -> list[tuple[str, tuple[int, ...], Q]]:
    """Names, shapes and types, so that each type of block is in one of the files."""
    simple = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.F16]
    wide = [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K]
    inner = 256 if architecture == "llama" else 32
    listed = [("token_embd.weight", (vocabulary, HIDDEN), Q.Q8_0), ("output_norm.weight", (HIDDEN,), Q.F32)]
    for layer in range(layers):
        kinds = [simple[(layer + place) % len(simple)] for place in range(6)]
        part = [
            ("attn_norm", (HIDDEN,), Q.F32),
            ("attn_q", (HEADS * HEAD_DIM, HIDDEN), kinds[0]),
            ("attn_k", (KV * HEAD_DIM, HIDDEN), kinds[1]),
            ("attn_v", (KV * HEAD_DIM, HIDDEN), kinds[2]),
            ("attn_output", (HIDDEN, HEADS * HEAD_DIM), Q.BF16),
            ("ffn_norm", (HIDDEN,), Q.F32),
            ("ffn_gate", (inner, HIDDEN), kinds[3]),
            ("ffn_up", (inner, HIDDEN), kinds[4]),
            ("ffn_down", (HIDDEN, inner), wide[layer % len(wide)] if inner == 256 else kinds[5]),
        ]
        if architecture == "gemma3":
            part += [(f"attn_{x}_norm", (HEAD_DIM,), Q.F32) for x in "qk"]
            part += [("post_attention_norm", (HIDDEN,), Q.F32), ("post_ffw_norm", (HIDDEN,), Q.F32)]
        listed += [(f"blk.{layer}.{name}.weight", shape, kind) for name, shape, kind in part]
        if architecture == "qwen2":
            widths = {"q": HEADS * HEAD_DIM, "k": KV * HEAD_DIM, "v": KV * HEAD_DIM}
            listed += [(f"blk.{layer}.attn_{x}.bias", (width,), Q.F32) for x, width in widths.items()]
    if architecture == "qwen2":
        listed.append(("output.weight", (vocabulary, HIDDEN), Q.F16))
    return listed


def write(path: Path, architecture: str, vocabulary: str, layers: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = json.loads((TESTDATA / "tokenizers" / f"{vocabulary}.json").read_text())
    rows = 1 + max([*tokens["model"]["vocab"].values(), *(token["id"] for token in tokens["added_tokens"])])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64 if architecture != "llama" else 131_072)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(256 if architecture == "llama" else 32)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500_000.0 if architecture == "llama" else 1_000_000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(HEAD_DIM)
        writer.add_tensor("rope_freqs.weight", llama3_factors())
    if architecture == "gemma3":
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_sliding_window(16)
    write_vocabulary(writer, vocabulary, tokens)
    for name, shape, kind in tensors(architecture, rows, layers):
        writer.add_tensor(name, blocks(random, shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def published(path: Path) -> dict[str, np.ndarray]:
    """What the package reads in a file, by Hugging Face name, as it was published."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    heads = reader.fields[f"{architecture}.attention.head_count"].contents()
    kv = reader.fields[f"{architecture}.attention.head_count_kv"].contents()
    values = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        widened = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        widened = widened.reshape(tuple(int(axis) for axis in reversed(tensor.shape)))
        values[hugging_face(architecture, tensor.name)] = as_published(architecture, tensor.name, widened, heads, kv)
    return values


def compare(path: Path, folder: Path) -> int:
    from safetensors.numpy import load_file

    imported, expected = load_file(folder / "model.safetensors"), published(path)
    if imported.keys() != expected.keys():
        print(f"names differ: {sorted(imported.keys() ^ expected.keys())[:5]}")
        return 1
    different = [
        name for name, values in expected.items()
        if values.shape != imported[name].shape or values.tobytes() != imported[name].tobytes()
    ]
    elements = sum(values.size for values in expected.values())
    print(f"{len(expected)} tensors, {elements} elements, {len(different)} tensors differ in a bit {different[:5]}")
    return 1 if different else 0


def main() -> int:
    if len(sys.argv) == 3:
        return compare(Path(sys.argv[1]), Path(sys.argv[2]))
    folder = TESTDATA / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for architecture, vocabulary, layers in [("llama", "llama", 5), ("gemma3", "gemma", 7), ("qwen2", "qwen2", 1)]:
        path = folder / f"{architecture}.gguf"
        write(path, architecture, vocabulary, layers, seed=len(expected))
        expected[architecture] = {name: fnv(values) for name, values in published(path).items()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=0) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
