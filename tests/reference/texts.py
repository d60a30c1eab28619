#!/usr/bin/env python3
"""Writes what transformers makes of awkward texts: chat templates to text, text to tokens.

usage: texts.py [--check]

Reads policy/testdata/chat/*.jinja and writes policy/testdata/chat/expected.json; makes one small tokenizer of each kind
that the families use (byte-level BPE as Llama 3, as Qwen2 and as SmolLM2 set it up, SentencePiece-like BPE as Gemma does)
and writes each with the ids of the awkward texts to policy/testdata/tokenizers/. With --check it writes nothing and exits
1 where a file differs.
"""

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import jinja2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils.chat_template_utils import _compile_jinja_template

TESTDATA = Path(__file__).resolve().parents[2] / "policy" / "testdata"

# What a template that asks for today is told.
UNIX_SECONDS = 1_763_848_800

AWKWARD = [
    "",
    " ",
    "  two before",
    "two after  ",
    "\ttab\nline\n\n\r\nlines\r",
    "don't I'LL we'Ve 's",
    "1234567890 3.14 1e-5 ١٢٣ ²½",
    "emoji 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽",
    "你好，世界。こんにちは 한국어 ไทย",
    "e\u0301 a\u0308\u0323 Å \u212b ﬁ",
    "NUL \x00 in the middle",
    "\x1c\x1dseparators\x1e\x1f",
    "\u200b\u200d\ufeffzero\u2060width",
    "שלום \u202eمرحبا\u202c",
    "\u00a0nbsp\u3000wide\u2003space\u0085next",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀 \U0010ffff",
    "{{ 7 * 7 }} {% raw %} {# no #}",
    '"quotes" \\ \'single\' <b>&amp;</b>',
    "<|im_start|>user\nhello<|im_end|>\n<|eot_id|><end_of_turn>",
    "<think>\nsteps\n</think>\n\nanswer",
    "▁underline▁ _under_ <0x0A> Ġ",
    "a" * 300 + " the" * 200,
]

SPECIAL = {
    "llama-3.1": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "llama-3.2": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2.5": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "gemma-3": {"bos_token": "<bos>", "eos_token": "<eos>"},
}


def conversations() -> list[list[tuple[str, str]]]:
    """Each awkward text asked alone, and turns in orders that templates accept or refuse."""
    alone = [[("user", text)] for text in AWKWARD]
    turns = [("user", " What is 2+2? "), ("assistant", "<think>\neasy\n</think>\n\n4 "), ("user", "And 3+3?\n")]
    system = ("system", "  Answer briefly.\n")
    return alone + [turns, [system, *turns], [system, turns[0]], turns[:2], [turns[1]], [turns[0], turns[0]], [system]]


def strftime_now(format: str) -> str:
    return datetime.fromtimestamp(UNIX_SECONDS, timezone.utc).strftime(format)


def rendered(template: str, special: dict, turns, answer_next: bool, clock: bool) -> dict:
    """A case: the conversation and its text, or `null` where the template refuses it."""
    messages = [{"role": role, "content": content} for role, content in turns]
    compiled = _compile_jinja_template(template)
    compiled.environment.globals.pop("strftime_now", None)
    if clock:
        compiled.environment.globals["strftime_now"] = strftime_now
    try:
        text = compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=answer_next, **special
        )
    except jinja2.TemplateError:
        text = None
    return {"messages": messages, "answer_next": answer_next, "unix_seconds": UNIX_SECONDS if clock else None, "text": text}


def chat_cases() -> dict:
    cases = {}
    for name, special in SPECIAL.items():
        template = (TESTDATA / "chat" / f"{name}.jinja").read_text()
        plain = [rendered(template, special, turns, True, False) for turns in conversations()]
        other = [rendered(template, special, turns, False, True) for turns in conversations()[len(AWKWARD) :]]
        cases[name] = {"special": special, "cases": plain + other}
    return cases


CORPUS = AWKWARD * 2 + [
    "The quick brown fox jumps over the lazy dog. Sphinx of black quartz, judge my vow.",
    "In a run, the policy answers the prompts; the critic judges the answers; the learner resolves them.",
    "don't won't I'll you've they're 12 123 1234 12345 2024-11-22",
] * 4

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern: str):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def byte_level(pre_tokenizer, specials: list[str], normalizer=None, ignore_merges=False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


# Pieces that are taken out of a text before anything else.
USER_DEFINED = ["\n\n", "▁▁", "<b>"]


def gemma() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=120,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    text = json.loads(tokenizer.to_str())
    model, size = text["model"], len(text["model"]["vocab"])
    model["vocab"] |= {piece: size + place for place, piece in enumerate(USER_DEFINED)}
    # As the conversion of SentencePiece's files does: every pair that makes up a piece, by the piece's score.
    scores = {piece: -float(id) for piece, id in model["vocab"].items()} | dict.fromkeys(USER_DEFINED, 0.0)
    ordered = sorted(model["vocab"], key=model["vocab"].get)
    model["merges"] = generate_merges(model["vocab"], {piece: scores[piece] for piece in ordered})
    # Bytes are ordinary entries of the vocabulary: as added tokens they would be read from text.
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(text))
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in USER_DEFINED])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def tokenizers() -> dict[str, tuple[Tokenizer, dict, dict]]:
    """By kind: the tokenizer, its tokenizer_config.json, and the part of config.json that transformers chooses by."""
    llama = byte_level(split(LLAMA3), ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], ignore_merges=True)
    bos = llama.token_to_id("<|begin_of_text|>")
    llama.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            pair="<|begin_of_text|> $A <|begin_of_text|> $B",
            special_tokens=[("<|begin_of_text|>", bos)],
        ),
    ])
    qwen = byte_level(split(QWEN2), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    digits = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    smol = byte_level(digits, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "llama": (llama, {**fast, **SPECIAL["llama-3.1"]}, {"model_type": "llama"}),
        "qwen2": (qwen, {"tokenizer_class": "Qwen2Tokenizer", **SPECIAL["qwen2.5"]}, {"model_type": "qwen2"}),
        "smollm2": (smol, {"tokenizer_class": "GPT2Tokenizer", **SPECIAL["smollm2"]}, {"model_type": "llama"}),
        "gemma": (
            gemma(),
            {"tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>", "pad_token": "<pad>", **SPECIAL["gemma-3"]},
            {"model_type": "gemma3_text"},
        ),
    }


def token_cases(tokenizer: Tokenizer, settings: dict, config: dict) -> dict:
    """Ids that transformers gives the awkward texts, from a folder as a model would be loaded."""
    # As in published folders; without it, transformers takes every added token for one without text.
    added = {str(token.pop("id")): token for token in json.loads(tokenizer.to_str())["added_tokens"]}
    settings = {**settings, "added_tokens_decoder": added}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in [
            ("tokenizer.json", tokenizer.to_str()),
            ("tokenizer_config.json", json.dumps(settings)),
            ("config.json", json.dumps(config)),
        ]:
            (Path(folder) / name).write_text(text)
        loaded = AutoTokenizer.from_pretrained(folder)
    print(type(loaded).__name__, len(loaded), file=sys.stderr)
    cases = [
        {
            "text": text,
            "plain": loaded(text, add_special_tokens=False)["input_ids"],
            "prompt": loaded(text)["input_ids"],
            "decoded": loaded.decode(
                loaded(text, add_special_tokens=False)["input_ids"],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            ),
        }
        for text in AWKWARD
    ]
    settings = {key: value for key, value in settings.items() if key != "added_tokens_decoder"}
    return {"settings": settings, "cases": cases}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    files = {TESTDATA / "chat" / "expected.json": json.dumps(chat_cases(), indent=0, ensure_ascii=True) + "\n"}
    for name, (tokenizer, settings, config) in tokenizers().items():
        folder = TESTDATA / "tokenizers"
        made = folder / f"{name}.json"
        if made.exists():
            # Training breaks ties differently from run to run: what was made once is kept.
            tokenizer = Tokenizer.from_file(str(made))
        files[made] = tokenizer.to_str() + "\n"
        files[folder / f"{name}-expected.json"] = json.dumps(token_cases(tokenizer, settings, config)) + "\n"
    different = 0
    for path, text in files.items():
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif path.read_text() != text:
            print(f"{path} differs", file=sys.stderr)
            different += 1
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
