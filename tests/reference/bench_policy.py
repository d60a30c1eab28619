#!/usr/bin/env python3
"""Runs `muster-bench policy` and Hugging Face transformers in turns on the same weights, prompts, batches and threads.

usage: bench_policy.py BENCH [--shape quickstart|135m] [--storage bf16|f32] [--kernels fused|int8] [--dtype float32|bfloat16]
                       [--batch 8,32] [--threads 2] [--rounds 5] [--gguf FILE] [--dir DIR]

BENCH is the program. The model is written by it (`--write-only`) and loaded by transformers as it is. A round measures
every engine at every batch once; printed are the medians of whole calls, prompts included, and their ratio, and the load
average beside them. Answers are sampled at temperature 1 and all of the same length, since neither side may stop early.

With --gguf, llama.cpp (llama-cpp-python) decodes one row of the same lengths from that file, which must hold the same
shape in the precision to compare with; its figure is for the answer alone and stands beside Muster's for the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

PAUSE_SECONDS = 0.5  # an engine's threads go on waiting busily for a while after it has answered


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("muster")
    parser.add_argument("--shape", default="quickstart")
    parser.add_argument("--storage", default="bf16")
    parser.add_argument("--kernels", default="fused")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", default="8,64")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gguf")
    parser.add_argument("--dir", default="runs/bench/models")
    return parser.parse_args()


class Muster:
    """The program, started once for each measurement, on the path that its workers take."""

    def __init__(self, args: argparse.Namespace):
        self.command = [args.muster, "policy", "--shape", args.shape, "--storage", args.storage]
        self.command += ["--dir", args.dir]
        self.folder = subprocess.run(
            [*self.command, "--write-only"], check=True, capture_output=True, text=True
        ).stdout.strip()
        self.command += ["--kernels", args.kernels, "--threads", str(args.threads)]
        self.command += ["--rounds", "1", "--measure", "decode", "--json"]

    def measure(self, rows: int) -> dict:
        """Tokens per second of whole calls (`rollout`) and of the answers alone (`decode`), and the lengths."""
        done = subprocess.run([*self.command, "--batch", str(rows)], check=True, capture_output=True, text=True)
        report = json.loads(done.stdout)
        rates = {figure["name"]: figure["tokens_per_second"]["median"] for figure in report["figures"]}
        return rates | {"prompt": report["prompt_tokens"], "answer": report["answer_tokens"]}


def prompt_ids(vocab: int, rows: int, length: int) -> list[list[int]]:
    """The prompts that `muster-bench policy` makes."""
    ids = max(vocab - 3, 1)
    return [[(row * 7919 + place * 104729) % ids + min(vocab, 3) for place in range(length)] for row in range(rows)]


class Transformers:
    """`generate` as its users call it."""

    def __init__(self, folder: str, dtype: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None

    def measure(self, rows: int, prompt: int, answer: int) -> float:
        """Tokens per second of one whole call."""
        ids = self.torch.tensor(prompt_ids(self.model.config.vocab_size, rows, prompt))
        start = time.perf_counter()
        with self.torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=answer,
                max_new_tokens=answer,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        assert out.shape == (rows, prompt + answer), out.shape
        return rows * answer / seconds


class LlamaCpp:
    """llama.cpp on one row, the likeliest token each time."""

    def __init__(self, file: str, threads: int, positions: int):
        from llama_cpp import Llama

        self.model = Llama(file, n_ctx=positions, n_threads=threads, n_threads_batch=threads, verbose=False)

    def measure(self, prompt: int, answer: int) -> float:
        """Tokens per second of the answer alone."""
        self.model.reset()
        self.model.eval(prompt_ids(self.model.n_vocab(), 1, prompt)[0])
        start = time.perf_counter()
        for _ in range(answer - 1):
            self.model.eval([self.model.sample(temp=0.0)])
        return (answer - 1) / (time.perf_counter() - start)


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    """One line: medians with their spread, and the median of the ratios within rounds."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    spans = [f"{statistics.median(v):.1f} ({min(v):.1f}–{max(v):.1f})" for v in (ours, theirs)]
    print(f"{name}: muster {spans[0]}, peer {spans[1]} tokens/s, ratio {ratio:.2f}, load {os.getloadavg()[0]:.1f}")


def main() -> None:
    args = parse()
    muster = Muster(args)
    batches = [int(rows) for rows in args.batch.split(",")]
    lengths = muster.measure(batches[0])
    prompt, answer = lengths["prompt"], lengths["answer"]
    peer = Transformers(muster.folder, args.dtype, args.threads)
    llama = LlamaCpp(args.gguf, args.threads, prompt + answer) if args.gguf else None
    print(f"{muster.folder}: prompts of {prompt}, answers of {answer} tokens, {args.threads} threads, load {os.getloadavg()[0]:.1f}")
    peer.measure(batches[0], prompt, answer)  # what is made at first use
    rates = {rows: ([], []) for rows in batches}
    single = ([], [])
    for _ in range(args.rounds):
        for rows, (ours, theirs) in rates.items():
            ours.append(muster.measure(rows)["rollout"])
            theirs.append(peer.measure(rows, prompt, answer))
            time.sleep(PAUSE_SECONDS)
        if llama:
            single[0].append(muster.measure(1)["decode"])
            single[1].append(llama.measure(prompt, answer))
            time.sleep(PAUSE_SECONDS)
    for rows, (ours, theirs) in rates.items():
        report(f"transformers, {rows} rows, whole calls", ours, theirs)
    if llama:
        report("llama.cpp, 1 row, answer alone", *single)


if __name__ == "__main__":
    main()
