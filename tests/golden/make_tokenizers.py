#!/usr/bin/env python3
"""Makes tests/golden/tokenizers: small tokenizer.json files trained here, and what the tokenizers library gives for them.

usage: make_tokenizers.py [OUTPUT_DIR]      (needs the tokenizers package; output does not depend on anything else)
"""
import json
import pathlib
import sys

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the quick brown fox jumps over the lazy dog", "the printer does not print the invoice",
          "I can't log in, it's asking for the password again!", "please reset my password and my account",
          "naïve café résumé größer Straße", "привет мир, как дела", "日本語の文章 を読む", "3.14 and 1234567 units"] * 4
TEXTS = ["", " ", "The quick brown fox.", "  the\t lazy\n\ndog  ", "I can't log in; it's naïve!", "NAÏVE CAFÉ e\u0301 a\u0323\u0301",
         "日本語 を読む", "привет, Йод", "unknown 👍 emoji ½", "[CLS] the [MASK] dog<mask> </s>", "x" * 120, "foo<extra>bar <extra> baz",
         "a\u200bb\x00c\ufffdd", "   ", "1234567 3.14", "İstanbul ΟΔΟΣ", "the printer, the printer, the printer"]
PAIRS = [("the quick brown fox jumps", "lazy dog"), ("", "dog"), ("the printer", "")]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=50))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=220, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")])
    tokenizer.add_tokens([AddedToken("<extra>", single_word=True, normalized=True)])
    return tokenizer


def bert_legacy():
    tokenizer = wordpiece()
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    document = json.loads(tokenizer.to_str())
    del document["model"]["type"]
    return Tokenizer.from_str(json.dumps(document)), document


def byte_level(roberta):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=roberta)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"], show_progress=False))
    if roberta:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)])])
    return tokenizer


def byte_fallback(merges_as_strings):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>"] + ([f"<0x{b:02X}>" for b in range(256)] if merges_as_strings else [])
    tokenizer.train_from_iterator(CORPUS[:4], trainers.BpeTrainer(vocab_size=len(specials) + 110, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    document = json.loads(tokenizer.to_str())
    # Only three stay added tokens: the byte tokens must come from the model's fallback.
    document["added_tokens"] = document["added_tokens"][:3]
    if merges_as_strings:
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    return Tokenizer.from_str(json.dumps(document)), document


def classes():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
                                                 normalizers.Strip(), normalizers.Replace(Regex(r"\d{4,}"), "0")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True),
                                                       pre_tokenizers.Punctuation("merged_with_previous"), pre_tokenizers.Metaspace(prepend_scheme="first")])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False))
    return tokenizer


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "tokenizers")
    made = {"wordpiece": wordpiece(), "wordpiece_legacy": bert_legacy(), "byte_level": byte_level(False), "roberta": byte_level(True),
            "byte_fallback": byte_fallback(True), "unknown_fused": byte_fallback(False), "classes": classes()}
    for name, item in made.items():
        tokenizer, document = item if isinstance(item, tuple) else (item, json.loads(item.to_str()))
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False) + "\n", "utf-8")
        rows = []
        for max_length in (0, 6, 7):
            tokenizer.no_truncation()
            if max_length:
                tokenizer.enable_truncation(max_length)
            for text in TEXTS + PAIRS:
                pair = isinstance(text, tuple)
                encoding = tokenizer.encode(*text) if pair else tokenizer.encode(text)
                rows.append(json.dumps({
                    "text": text[0] if pair else text, **({"text_pair": text[1]} if pair else {}), "max_length": max_length,
                    "input_ids": encoding.ids, "token_type_ids": encoding.type_ids, "tokens": encoding.tokens, "offsets": encoding.offsets}))
        (folder / name / "expected.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
