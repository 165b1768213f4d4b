#!/usr/bin/env python3
"""Compares `tokenize` with the Hugging Face tokenizers library: ids, type ids, tokens and offsets must be equal.

usage: tokenizer_ids.py BINARY DIR... [--data DIR] [--count N] [--seed S] [--every-code-point]
BINARY has a `tokenize` subcommand (the program, or the test driver). DIR holds a tokenizer.json or tokenizer.json.xz.
--data: a directory whose text files are sampled besides the synthetic texts.
"""
import argparse
import json
import lzma
import pathlib
import random
import subprocess
import sys
import tempfile

import tokenizers

WORDS = ["hello", "World", "naïve", "Straße", "İstanbul", "ﬁne", "don't", "I'll", "we've", "'S", "ſ's", "größer", "Ａｂｃ",
         "Привет", "мир", "Йод", "йогурт", "Ελλάδα", "ΟΔΟΣ", "שלום", "שָׁלוֹם", "العربية", "مُحَمَّد", "हिन्दी", "ক্ষেত্র",
         "ภาษาไทย", "日本語", "カタカナ", "ガギ", "ガ", "한국어", "한글", "中文字", "𠀀𪜀", "豈更", "Tiếng Việt", "Việt",
         "e\u0301", "a\u0323\u0301", "a\u0301\u0323", "q\u0307\u0323", "👍", "👩‍👩‍👧", "🇩🇪", "❤️", "½", "²", "①", "٣٤", "१२३",
         "3.14", "1234567", "C++", "foo_bar", "http://a.b/c?d=e&f", "x" * 101, "y" * 300, "antidisestablishmentarianism",
         "\u1e9e", "ǅ", "ŉ", "\u212b", "\ufb03", "㌀", "\u0344", "\u0f73", "\u1d160", "\u2126", "™", "…", "—", "“q”", "$5", "`",
         "<s>", "</s>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "<mask>", "<unk>",
         "<pad>", "<|begin_of_text|>", "▁", "▁▁x", "Ġ", "<0x0A>", "##ing", "[cls]", "<S>"]
SPACES = [" ", " ", " ", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\u0085", "\x0b",
          "\u180e", "\u200d", "\ufeff", "\x00", "\x07", "\ufffd", "", "", "-", ",", "."]


def synthetic(rng, count, specials):
    words = WORDS + specials
    for _ in range(count):
        kind = rng.random()
        if kind < 0.6:
            text = "".join(rng.choice(words) + rng.choice(SPACES) for _ in range(rng.randint(0, 12)))
        elif kind < 0.75:
            text = "".join(chr(rng.choice([rng.randrange(0x20, 0x7F), rng.randrange(0x250), rng.randrange(0x3000)]))
                           for _ in range(rng.randint(1, 40)))
        elif kind < 0.85:
            text = "".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(rng.randint(1, 12)))
                           if not 0xD800 <= c < 0xE000)
        elif kind < 0.95:
            marks = [chr(c) for c in list(range(0x300, 0x370)) + list(range(0x591, 0x5C8)) + list(range(0x93A, 0x94F)) +
                     list(range(0x1100, 0x1200, 7)) + [0x1161, 0x11A8, 0x3099, 0x309A, 0x20D0, 0x1D165, 0x1D16D]]
            text = "".join(rng.choice("aeoqΑאकガ가ㄱ 1") + "".join(rng.choices(marks, k=rng.randint(0, 4)))
                           for _ in range(rng.randint(1, 10)))
        else:
            text = rng.choice([" ", "\n", "a", "^", "é", "中", "👍", "'", "\t ", "1"]) * rng.randint(1, 3000)
        yield text


def from_data(rng, directory, count):
    files = [f for f in sorted(pathlib.Path(directory).rglob("*")) if f.suffix in (".txt", ".jsonl", ".json", ".tsv", ".csv", ".conll")]
    lines = []
    for file in files:
        with open(file, encoding="utf-8", errors="ignore") as handle:
            lines += [line.rstrip("\n")[:4000] for _, line in zip(range(2000), handle)]
    return rng.sample(lines, min(count, len(lines)))


def every_code_point():
    for begin in range(0, 0x110000, 64):
        chars = [chr(c) for c in range(begin, begin + 64) if not 0xD800 <= c < 0xE000]
        if chars:
            yield " ".join(chars)
            yield "a" + "a".join(chars)
            yield "".join(chars)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("directories", nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every-code-point", action="store_true")
    parser.add_argument("--max-length", type=int, default=0)
    arguments = parser.parse_args()
    failures = 0
    for directory in map(pathlib.Path, arguments.directories):
        failures += compare(arguments, directory)
    sys.exit(1 if failures else 0)


def compare(arguments, directory):
    rng = random.Random(arguments.seed)
    plain = directory / "tokenizer.json"
    document = plain.read_text("utf-8") if plain.exists() else lzma.open(directory / "tokenizer.json.xz", "rt", encoding="utf-8").read()
    reference = tokenizers.Tokenizer.from_str(document)
    reference.no_padding()
    reference.no_truncation()
    if arguments.max_length:
        reference.enable_truncation(arguments.max_length)
    specials = [token.content for token in reference.get_added_tokens_decoder().values()][:20]
    texts = list(synthetic(rng, arguments.count, specials))
    if arguments.data:
        texts += from_data(rng, arguments.data, arguments.count)
    if arguments.every_code_point:
        texts += list(every_code_point())
    rows = [{"text": text} for text in texts]
    rows += [{"text": rng.choice(texts), "text_pair": rng.choice(texts)} for _ in range(len(texts) // 10)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        (folder / "tokenizer.json").write_text(document, "utf-8")
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [arguments.binary, "tokenize", "--tokenizer", temporary, "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
        if arguments.max_length:
            command += ["--max_length", str(arguments.max_length)]
        subprocess.run(command, check=True)
        output = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").split("\n") if line]
    assert len(output) == len(rows), (len(output), len(rows))
    wrong = {"input_ids": 0, "token_type_ids": 0, "tokens": 0, "offsets": 0}
    shown = 0
    for row, own in zip(rows, output):
        theirs = reference.encode(row["text"], row.get("text_pair"))
        expected = {"input_ids": theirs.ids, "token_type_ids": theirs.type_ids, "tokens": theirs.tokens,
                    "offsets": [list(offset) for offset in theirs.offsets]}
        bad = [key for key in expected if own[key] != expected[key]]
        for key in bad:
            wrong[key] += 1
        if bad and shown < 5:
            shown += 1
            print(f"  {bad} {json.dumps(row)[:300]}")
            if "input_ids" in bad or "tokens" in bad:
                at = next((i for i, (a, b) in enumerate(zip(own["tokens"], expected["tokens"])) if a != b), -1)
                print(f"    token {at}: {own['tokens'][max(at, 0):at + 4]} expected {expected['tokens'][max(at, 0):at + 4]}")
            else:
                at = next(i for i, (a, b) in enumerate(zip(own[bad[0]], expected[bad[0]])) if a != b)
                print(f"    token {at} {expected['tokens'][at]!r}: {own[bad[0]][at]} expected {expected[bad[0]][at]}")
    print(f"{directory.name}: {len(rows)} texts, differing: {wrong}")
    return sum(wrong.values())


if __name__ == "__main__":
    main()
