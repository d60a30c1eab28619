#!/usr/bin/env python3
"""Reference numbers of Hugging Face transformers for small models of every family that Muster runs.

usage: families.py write [FOLDER]     (by default policy/testdata/families)
       families.py check FOLDERS      loads the folders that Muster wrote, and compares logits with the numbers on record

`write` makes one file per family: configurations as they would stand in config.json, tokens, and logits at a few
positions; and rope.json, the rotary frequencies of published models. Weights are not stored: both sides compute them
from the tensors' names (`values` below, `testing::formula` in Rust). Folders to check come from the ignored test
`write_folders_for_transformers`:

    MUSTER_FOLDERS=/tmp/folders cargo test --release -p muster-policy --lib write_folders_for_transformers -- --ignored

Exits 1 when a difference is above 1e-4.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LIMIT = 1e-4
VOCAB = 32
ROOT = Path(__file__).resolve().parents[2]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
PUBLISHED_LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 8192}
PUBLISHED_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

# (name, tokens, keys of config.json), by family.
CASES = {
    "llama": [
        ("tied, grouped", 30, {"rope_theta": 10000.0, "tie_word_embeddings": True}),
        (
            "SmolLM2's heads",
            30,
            {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0},
        ),
        (
            "every bias, no grouping, heads apart from the width",
            20,
            {
                "num_attention_heads": 3,
                "num_key_value_heads": None,
                "head_dim": 10,
                "attention_bias": True,
                "mlp_bias": True,
                "rms_norm_eps": 1e-5,
            },
        ),
        ("llama3", 60, {"rope_theta": 500.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
        ("llama3, keys of transformers 5", 60, {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}}),
        ("linear", 40, {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}),
        ("dynamic", 64, {"rope_theta": 1000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ],
    "qwen2": [
        ("tied, grouped", 30, {"rope_theta": 1000000.0, "tie_word_embeddings": True}),
        ("untied, one key head", 30, {"num_key_value_heads": 1, "hidden_size": 40, "num_hidden_layers": 1}),
        (
            "window named but off",
            30,
            {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1},
        ),
        (
            "window on in deep layers",
            40,
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
        ),
        ("yarn", 60, {"rope_theta": 1000.0, "rope_scaling": {"type": "yarn", **YARN}}),
    ],
    "qwen3": [
        ("tied, heads apart from the width", 30, {"head_dim": 10, "tie_word_embeddings": True}),
        (
            "untied, biases, no grouping",
            30,
            {"head_dim": 6, "num_key_value_heads": 4, "attention_bias": True, "rope_theta": 1000000.0},
        ),
        (
            "windows by layer type",
            40,
            {
                "head_dim": 8,
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        (
            "yarn with its own ramp",
            60,
            {
                "head_dim": 16,
                "rope_theta": 1000.0,
                "rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3},
            },
        ),
    ],
    "gemma3": [
        (
            "keys of transformers 4, context beyond the window",
            50,
            {
                "head_dim": 12,
                "num_hidden_layers": 3,
                "sliding_window": 7,
                "sliding_window_pattern": 3,
                "rope_theta": 1000.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "query_pre_attn_scalar": 20,
            },
        ),
        (
            "keys of transformers 5, one key head",
            40,
            {
                "head_dim": 16,
                "num_key_value_heads": 1,
                "num_hidden_layers": 3,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                },
                "query_pre_attn_scalar": 16,
            },
        ),
        (
            "both caps, untied, biases",
            40,
            {
                "head_dim": 8,
                "sliding_window": 16,
                "sliding_window_pattern": 2,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
                "attention_bias": True,
                "tie_word_embeddings": False,
                "query_pre_attn_scalar": 8,
            },
        ),
        ("the pattern that a file leaves out", 40, {"head_dim": 8, "num_hidden_layers": 7, "sliding_window": 5}),
        ("text of a model of images and text", 30, {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2}),
    ],
}
IMAGES = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

# What published models ask of rotary embeddings: (name, model_type, width of a head, positions, keys).
ROPES = [
    ("Llama 3.2 1B", "llama", 64, 131072, {"rope_theta": 500000.0, "rope_scaling": {**PUBLISHED_LLAMA3, "factor": 32.0}}),
    ("Llama 3.1 8B", "llama", 128, 131072, {"rope_theta": 500000.0, "rope_scaling": {**PUBLISHED_LLAMA3, "factor": 8.0}}),
    ("SmolLM2 135M", "llama", 64, 8192, {"rope_theta": 100000.0}),
    ("Qwen2.5 with yarn", "qwen2", 128, 131072, {"rope_theta": 1000000.0, "rope_scaling": PUBLISHED_YARN}),
    ("Qwen3 with yarn", "qwen3", 128, 131072, {"rope_theta": 1000000.0, "rope_scaling": PUBLISHED_YARN}),
    (
        "yarn, every other key",
        "qwen3",
        128,
        65536,
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {**PUBLISHED_YARN, "factor": 2.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.1},
        },
    ),
    ("linear", "llama", 128, 16384, {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 8.0}}),
]


def values(name: str, shape: list[int], base: float, amplitude: float) -> torch.Tensor:
    """`base + amplitude·(2u − 1)`: u the upper 24 bits of splitmix64 of the name's FNV-1a and the element's place."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.from_numpy((base + amplitude * (2 * u - 1)).astype(np.float32).reshape(shape))


def weight(name: str, shape: list[int], gemma: bool) -> torch.Tensor:
    """Weights with biases and norms away from 0 and 1, and logits far enough apart to matter."""
    if name.endswith(".bias"):
        return values(name, shape, 0.0, 0.3)
    if len(shape) == 1:
        return values(name, shape, 0.0 if gemma else 1.0, 0.3)
    if name.endswith("embed_tokens.weight"):
        return values(name, shape, 0.0, 0.7)
    return values(name, shape, 0.0, 2.4 / math.sqrt(shape[1]))


def tokens_of(count: int) -> list[int]:
    return [(7 * place * place + 3 * place + 5) % VOCAB for place in range(count)]


def positions_of(count: int) -> list[int]:
    return sorted({0, 1, 6, 7, 17, count // 2, count - 2, count - 1})


def logits_of(model, config, tokens: list[int]) -> np.ndarray:
    """Logits at every position. Transformers knows Gemma's cap on scores but does not hand it to its attention."""
    text = config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    extra = {} if cap is None else {"softcap": cap}
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False, **extra).logits[0].numpy()


def load(folder: Path):
    """A folder as it is, with the attention that is written plainly."""
    config = AutoConfig.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = [name for name in report["missing_keys"] if "lm_head" not in name]
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        sys.exit(f"{folder}: {report}")
    return model.eval(), config


def shapes_of(config) -> dict[str, list[int]]:
    """Names and shapes of what a published file holds: a tied head is not in it."""
    model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def text_name(tensor: str) -> str:
    """Name of a tensor where the text decoder is the whole model."""
    return tensor.replace("model.language_model.", "model.")


def case(model_type: str, name: str, count: int, keys: dict) -> dict:
    file = {"architectures": [CLASSES[model_type]], "model_type": model_type, **SIZES, "rms_norm_eps": 1e-6, **keys}
    if "images" in name:
        within = {key: value for key, value in file.items() if key not in ("architectures", "eos_token_id")}
        file = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 6]}
        file |= {"text_config": within, "vision_config": IMAGES, "mm_tokens_per_image": 4}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(file))
        config = AutoConfig.from_pretrained(folder)
        gemma = model_type.startswith("gemma3")
        tensors = {name: weight(text_name(name), shape, gemma) for name, shape in shapes_of(config).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model, config = load(folder)
        tokens = tokens_of(count)
        logits = logits_of(model, config, tokens)
    return {
        "name": name,
        "config": file,
        "tokens": tokens,
        "positions": positions_of(count),
        "logits": [[float(f"{value:.7g}") for value in logits[place]] for place in positions_of(count)],
    }


def rope_case(name: str, model_type: str, dim: int, positions: int, keys: dict) -> dict:
    file = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        **SIZES,
        "head_dim": dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        **keys,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(file))
        config = AutoConfig.from_pretrained(folder)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    return {
        "name": name,
        "config": file,
        "attention_factor": float(rotary.attention_scaling),
        "frequencies": [float(f"{value:.9g}") for value in rotary.inv_freq],
    }


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    for family, cases in CASES.items():
        model_type = "gemma3_text" if family == "gemma3" else family
        found = [case(model_type, *described) for described in cases]
        save(folder / f"{family}.json", {"versions": versions, "cases": found})
    save(folder / "rope.json", {"versions": versions, "cases": [rope_case(*described) for described in ROPES]})


def save(path: Path, content: dict) -> None:
    """One case a line: small, and a change of one case is one line."""
    cases = ",\n".join(json.dumps(case) for case in content["cases"])
    path.write_text(f'{{"versions": {json.dumps(content["versions"])}, "cases": [\n{cases}\n]}}\n')
    print(f"{path}: {len(content['cases'])} cases, {path.stat().st_size} bytes")


def check(folders: Path) -> None:
    worst = 0.0
    for family in CASES:
        for number, case in enumerate(json.loads((ROOT / f"policy/testdata/families/{family}.json").read_text())["cases"]):
            model, config = load(folders / f"{family}-{number}")
            logits = logits_of(model, config, case["tokens"])[case["positions"]]
            difference = float(np.abs(logits - np.array(case["logits"])).max())
            worst = max(worst, difference)
            print(f"{family} {case['name']}: {difference:.1e}")
    print(f"largest difference {worst:.1e}, limit {LIMIT:.0e}")
    sys.exit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    if arguments[:1] == ["write"]:
        write(Path(arguments[1]) if len(arguments) > 1 else ROOT / "policy/testdata/families")
    elif arguments[:1] == ["check"] and len(arguments) == 2:
        check(Path(arguments[1]))
    else:
        sys.exit(__doc__)
