#!/usr/bin/env python3
"""Holds the log-probs that Muster gives to texts of a model folder against those of Hugging Face transformers.

usage: folder_logprobs.py continue FOLDER OUT.jsonl                    20 prompts, continued greedily by 64 tokens
       folder_logprobs.py compare FOLDER TEXTS.jsonl LOGPROBS.jsonl    what `muster logprobs --tokens TEXTS.jsonl` printed
       folder_logprobs.py llama FILE.gguf TEXTS.jsonl LOGPROBS.jsonl   the same beside llama.cpp (llama-cpp-python)

Both load the folder as it is, in float32. Compared is every token but the first of each text; the largest difference
allowed is 1e-3 nats. On a published model, from its GGUF file:

  muster model import gemma3-270m-Q4_K_M.gguf --out gemma --dtype f32
  folder_logprobs.py continue gemma texts.jsonl
  muster logprobs --model gemma --tokens texts.jsonl > logprobs.jsonl
  folder_logprobs.py compare gemma texts.jsonl logprobs.jsonl
  folder_logprobs.py llama gemma3-270m-Q4_K_M.gguf texts.jsonl logprobs.jsonl

llama.cpp multiplies the quantised blocks with activations rounded to eight bits, so its numbers are reported without a limit:
how often its likeliest token is the one that continues the text (the last 64, which are the likeliest on the dequantised
weights), and the differences of the log-probs.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    if n < 2:\n",
    "Once upon a time there was a",
    "日本の首都は",
    "Die Hauptstadt von Deutschland ist",
    "1, 1, 2, 3, 5, 8,",
    "To be, or not to be,",
    "The quick brown fox",
    "SELECT name FROM users WHERE",
    "In 1969, humans first landed on",
    "La vie est",
    "The derivative of x^2 is",
    "Ingredients: 2 eggs, 100 g flour",
    "🙂🙃😉 emoji are",
    "Photosynthesis is the process by which",
    "Q: What is 7 times 8?\nA:",
    "Roses are red,\nviolets are",
    "import numpy as np\n",
    "The stock market fell",
]

LIMIT = 1e-3
CONTINUED = 64


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def continued(folder: Path, count: int) -> list[list[int]]:
    """Each prompt's tokens and the likeliest `count` that follow; no token ends the text, so that all are as long."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        whole = model.generate(**batch, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    width = batch["input_ids"].shape[1]
    starts = (width - batch["attention_mask"].sum(dim=1)).tolist()
    return [tokens[start:].tolist() for tokens, start in zip(whole, starts)]


def logprobs(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def llama(file: Path, texts: list[list[int]], found: list[list[float]]) -> dict:
    """llama.cpp on a GGUF file, each text in one pass."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=max(map(len, texts)), logits_all=True, verbose=False)
    differences, agreed = [], []
    for tokens, values in zip(texts, found, strict=True):
        model.reset()
        model.eval(tokens)
        logits = torch.tensor(model.scores[: len(tokens) - 1])
        wanted = torch.tensor(tokens[1:])
        given = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0]
        differences.append((given - torch.tensor(values)).abs())
        agreed.append((logits.argmax(dim=-1) == wanted)[-CONTINUED:])
    differences, agreed = torch.cat(differences), torch.cat(agreed)
    return {
        "texts": len(texts),
        "continued": agreed.numel(),
        "top_1_agreement": agreed.float().mean().item(),
        "difference_median": differences.median().item(),
        "difference_max": differences.max().item(),
    }


def main() -> int:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "continue":
        lines = [json.dumps({"tokens": tokens}) for tokens in continued(folder, CONTINUED)]
        Path(sys.argv[3]).write_text("\n".join(lines) + "\n")
        return 0
    texts, found = (
        [json.loads(line)[key] for line in Path(path).read_text().splitlines()]
        for path, key in zip(sys.argv[3:5], ("tokens", "logprobs"))
    )
    if mode == "llama":
        print(json.dumps(llama(folder, texts, found)))
        return 0
    model = load(folder)
    differences = torch.cat([
        (logprobs(model, tokens) - torch.tensor(values)).abs() for tokens, values in zip(texts, found, strict=True)
    ])
    print(json.dumps({
        "texts": len(texts),
        "tokens": differences.numel(),
        "difference_mean": differences.mean().item(),
        "difference_median": differences.median().item(),
        "difference_max": differences.max().item(),
        "limit": LIMIT,
    }))
    return 0 if differences.max() <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
