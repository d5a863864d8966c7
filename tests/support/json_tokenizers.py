"""Small `tokenizer.json` files of the kinds that people have, trained here, and nasty texts."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> list[Any]:
    return [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(False, use_regex=False)]


KINDS: dict[str, dict[str, Any]] = {
    # Specials after the pieces, whole pieces before merges, a template that begins a text.
    "llama3": {
        "pre": pre.Sequence(_split(LLAMA3)),
        "after": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        "model": {"ignore_merges": True},
        "template": "<|begin_of_text|>",
        "config": {"eos_token": "<|end_of_text|>"},
        "ids": ("<|begin_of_text|>", "<|end_of_text|>", None),
    },
    # NFC, and control tokens that are not marked as special.
    "qwen": {
        "pre": pre.Sequence(_split(QWEN)),
        "normalizer": normalizers.NFC(),
        "after": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "text": ["<tool_call>", "</tool_call>"],
        "config": {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"},
        "ids": (None, "<|im_end|>", "<|endoftext|>"),
    },
    # The end of a document is id 0, and runs of spaces are added tokens.
    "neox": {
        "pre": pre.ByteLevel(False, use_regex=True),
        "normalizer": normalizers.NFC(),
        "before": ["<|endoftext|>", "<|padding|>"],
        "text": [" " * n for n in range(2, 9)],
        "map": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        "ids": ("<|endoftext|>", "<|endoftext|>", None),
    },
    # Digits one by one in a step of their own.
    "digits": {
        "pre": pre.Sequence([pre.Digits(True), *_split(LLAMA3)]),
        "before": ["<|endoftext|>", "<|fim_prefix|>"],
        "map": {"eos_token": "<|endoftext|>", "pad_token": "<|fim_prefix|>"},
        "ids": (None, "<|endoftext|>", "<|fim_prefix|>"),
    },
}

CORPUS = [
    "The cat sat on the mat, and the dog's owner said: 'we'll see in 2024!'",
    "def main(arguments):\n    return [x ** 2 for x in range(10)]\n\n\n",
    "Übung macht den Meister; naïve café, Ελληνικά, русский язык, 日本語の文章, العربية, हिन्दी 🙂",
] * 8


def make_json_tokenizer(folder: Path, kind: str, vocab_size: int = 420) -> Path:
    """Write `tokenizer.json` of a kind and the files beside it; the path."""
    made = KINDS[kind]
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = made["pre"], decoders.ByteLevel()
    if "normalizer" in made:
        library.normalizer = made["normalizer"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=made.get("before", []),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens(made.get("after", []))
    library.add_tokens([AddedToken(text, special=False) for text in made.get("text", [])])

    content = json.loads(library.to_str())
    content["model"] |= made.get("model", {})
    # As if someone had saved it after a batch of short texts.
    content["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    if "template" in made:
        name = made["template"]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": name, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {
                name: {"id": name, "ids": [library.token_to_id(name)], "tokens": [name]}
            },
        }
    return write_json_tokenizer(folder, content, made.get("config"), made.get("map"))


def write_json_tokenizer(
    folder: Path,
    content: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    special_map: Mapping[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer_config", config), ("special_tokens_map", special_map)):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


PARTS = [
    "the", "cat", " ", "  ", "       ", "\t", "\n", "\r\n", "\n\n\n", "12", "3.14159", "'s", "'LL",
    "é", "e\u0301", "\u212b", "A\u030a\u0327", "ﬁ", "🙂", "👩\u200d👩\u200d👧\u200d👦",
    "🇩🇪", "日本", "한국어", "ไทย", "हिन्दी",
    "العربية", "עברית", "\u200b", "\u200d", "\ufeff", "\u2581", "\u00a0", "\u3000", "\x00", "\x07",
    "\x7f", "\u0085", "\ue000", "\U0010fffd", "\ufffd", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!!????", "_x_y__", "ǅ", "ß", "İ", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>",
    "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|fim_prefix|>",
    "<|padding|>", "<fim_middle>", "<|", "|>", "\\", '"', "{}", "&amp;",
]  # fmt: skip


def nasty_texts(count: int, seed: int = 1) -> list[str]:
    """Texts of parts that tokenizers treat in special ways, joined at random."""
    draw = random.Random(seed)
    return [
        "",
        *PARTS,
        *("".join(draw.choices(PARTS, k=draw.randint(2, 12))) for _ in range(count)),
    ]
