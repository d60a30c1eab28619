#!/usr/bin/env python3
"""Loads a checkpoint with Hugging Face transformers as it is, and compares log-probs of rollouts on record.

usage: transformers_logprobs.py RUN_DIR FOLDER [--limit 1e-3] [--json]

RUN_DIR is a run's directory, FOLDER a checkpoint of it (RUN_DIR/checkpoints/V) or what `muster snapshot pull` wrote.
Compared are the rollouts in RUN_DIR/rollouts/*.jsonl that were drawn under the folder's version, which stands in its
manifest.json: a log-prob on record is that of the drawn token under the sampling temperature. Also held: the folder's
tokenizer gives back each prompt's tokens from its text, and an answer's text reads back as its tokens.

Exits 0 when the largest difference is within the limit, 1 when it is not or there is nothing to compare.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def rollouts_of(run_dir: Path, version: int) -> list[dict]:
    """Rollouts on record that this version drew."""
    rollouts = []
    for path in sorted((run_dir / "rollouts").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                rollout = json.loads(line)
                if rollout["policy_version"] == version:
                    rollouts.append(rollout)
    return rollouts


def logprobs(model, rollout: dict) -> torch.Tensor:
    """Log-probs of the drawn tokens under the sampling temperature: [completion tokens], in nats."""
    prompt, completion = rollout["prompt_tokens"], rollout["completion_tokens"]
    tokens = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
    # Position t predicts token t + 1, so the answer is predicted from the prompt's last position on.
    predictions = logits[len(prompt) - 1 : -1] / rollout["temperature"]
    chosen = torch.tensor(completion)[:, None]
    return torch.log_softmax(predictions, dim=-1).gather(1, chosen)[:, 0]


def text_survives(tokenizer, rollout: dict) -> bool:
    """Whether prompt and answer read back as their tokens, as far as the tokens have a text.

    An embedding may have more rows than the vocabulary, and a policy that explores draws such a row now and then.
    """
    vocabulary, special = set(tokenizer.get_vocab().values()), set(tokenizer.all_special_ids)
    texts = (rollout["prompt_tokens"], rollout["completion_tokens"])
    return all(
        tokenizer.encode(tokenizer.decode(tokens), add_special_tokens=False) == tokens
        for tokens in texts
        if set(tokens) <= vocabulary - special
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, default=1e-3, help="largest difference allowed, in nats")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    arguments = parser.parse_args()

    version = json.loads((arguments.folder / "manifest.json").read_text())["policy_version"]
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    rollouts = rollouts_of(arguments.run_dir, version)
    if not rollouts:
        print(f"no rollout on record was drawn under version {version}: choose another folder", file=sys.stderr)
        return 1

    differences = torch.cat([
        (logprobs(model, rollout) - torch.tensor(rollout["rollout_logprobs"])).abs() for rollout in rollouts
    ])
    broken = [rollout["ticket"] for rollout in rollouts if not text_survives(tokenizer, rollout)]
    result = {
        "policy_version": version,
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rollouts": len(rollouts),
        "tokens": differences.numel(),
        "difference_mean": differences.mean().item(),
        "difference_max": differences.max().item(),
        "limit": arguments.limit,
        "texts_changed": len(broken),
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:16} {value}")
    if broken:
        print(f"the tokenizer changes the text of ticket {broken[0]} and {len(broken) - 1} others", file=sys.stderr)
    return 0 if result["difference_max"] <= arguments.limit and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
