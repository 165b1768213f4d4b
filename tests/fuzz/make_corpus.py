#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets: tests/fuzz/corpus/<target>/<name>. Small, valid or broken in one way each.

scripts/fuzz --minimise adds inputs that reach further; those have names of 40 hexadecimal digits.
"""
import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).parent / "corpus"


def put(target, name, content):
    file = CORPUS / target / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def text(value):
    return json.dumps(value, separators=(",", ":"))


def manifests():
    """Without the checksum, which the target adds."""
    run = {"step": 40, "run_id": "r", "state": {"cursor": {"epoch": 1}}}
    files = [{"name": "shard-00000-of-00002.h5", "size": 4096, "digest": "6c0e0ce7a8d1bd4e", "block_table": True},
             {"name": "shard-00001-of-00002.h5", "size": 4096, "digest": "03e3b4a5c1f0d9e2", "block_table": True},
             {"name": "config.json", "size": 812, "digest": "03e3b4a5c1f0d9e2", "block_table": False}]
    tensors = [{"name": "a", "field": "exp_avg", "dtype": "float32", "shape": [2, 3], "slices": [[0, 1024, 0, 2], [1, 64, 2, 4]]},
               {"name": "a", "field": "value", "dtype": "float32", "shape": [2, 3], "slices": [[0, 2048, 0, 6]]},
               {"name": "b", "field": "value", "dtype": "float32", "shape": [0], "slices": []},
               {"name": "c", "field": "value", "dtype": "float32", "shape": [], "slices": [[1, 4092, 0, 1]]}]
    good = {"format": "shardtune-checkpoint", "version": 1, "step": 40, "num_ranks": 2, "run": run, "files": files, "tensors": tensors}
    variants = {"good": good, "newer": {**good, "version": 99},
                "bf16": {**good, "version": 2, "tensors": [{**tensors[0], "dtype": "bfloat16"}, *tensors[1:]]}, "no_tensors": {**good, "tensors": []},
                "compressed": {**good, "version": 2, "files": [{**files[0], "size": 900, "raw_size": 4096}, *files[1:]]},
                "outside": {**good, "tensors": [{**tensors[3], "slices": [[1, 4093, 0, 1]]}]},
                "huge_shape": {**good, "tensors": [{**tensors[3], "shape": [2**62, 2**62]}]},
                "path": {**good, "files": [{**files[0], "name": "../x.h5"}]}}
    for name, value in variants.items():
        put("manifest", name, text(value)[:-1])  # the target closes the object behind the checksum


def safetensors_file(header, data=b""):
    header = header if isinstance(header, bytes) else text(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def safetensors():
    def entry(dtype, shape, begin, end):
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    good = {"__metadata__": {"format": "pt"}, "a": entry("F32", [2], 0, 8), "b": entry("BF16", [1, 1], 8, 10),
            "c": entry("F16", [1], 10, 12), "d": entry("F64", [1], 12, 20), "e": entry("I64", [0, 3], 20, 20)}
    put("safetensors", "good", safetensors_file(good, bytes(range(20))))
    put("safetensors", "padded", safetensors_file(text(good).encode() + b"   ", bytes(20)))
    put("safetensors", "empty", safetensors_file({}))
    put("safetensors", "four_bits", safetensors_file({"a": entry("F4", [4], 0, 2), "b": entry("F8_E4M3", [1], 2, 3)}, bytes(3)))
    put("safetensors", "hole", safetensors_file({"a": entry("F32", [1], 4, 8)}, bytes(8)))
    put("safetensors", "overlap", safetensors_file({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)))
    put("safetensors", "overflow", safetensors_file({"a": entry("F32", [2**32, 2**32], 0, 0)}))
    put("safetensors", "huge_header", struct.pack("<Q", 2**63) + b"{}")
    put("safetensors", "deep", safetensors_file(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"))


def indices():
    put("safetensors_index", "good", text({"metadata": {"total_size": 52}, "weight_map": {
        "x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors", "w": "b.safetensors"}}))
    put("safetensors_index", "missing_tensor", text({"weight_map": {"q": "a.safetensors"}}))
    put("safetensors_index", "missing_file", text({"weight_map": {"x": "d.safetensors"}}))
    put("safetensors_index", "outside", text({"weight_map": {"outside": "../c.safetensors"}}))
    put("safetensors_index", "absolute", text({"weight_map": {"x": "/etc/passwd"}}))
    put("safetensors_index", "no_map", text({"weight_map": []}))


def configs():
    bert = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 54, "hidden_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 40,
            "type_vocab_size": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
            "classifier_dropout": None, "layer_norm_eps": 1e-12, "pad_token_id": 0, "position_embedding_type": "absolute",
            "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "initializer_range": 0.02}
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 54, "hidden_size": 32,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 44, "head_dim": 8,
             "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0,
             "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "attention_dropout": 0.0,
             "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 32}}
    put("config", "bert", text(bert))
    put("config", "llama", text(llama))
    put("config", "llama_plain", text({key: value for key, value in llama.items() if key not in ("rope_scaling", "head_dim")}))
    put("config", "many_layers", text({**bert, "num_hidden_layers": 10**12}))
    put("config", "huge", text({**llama, "vocab_size": 2**62, "hidden_size": 2**62, "head_dim": 2**60}))
    put("config", "other", text({"model_type": "gpt2"}))


def tokenizers():
    special = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])]
    words = {token["content"]: token["id"] for token in special} | {"a": 4, "b": 5, "##c": 6, "hello": 7, "w1": 8, ",": 9}
    wordpiece = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
                 "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                                "strip_accents": None, "lowercase": True},
                 "pre_tokenizer": {"type": "BertPreTokenizer"},
                 "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                                                                            {"Sequence": {"id": "A", "type_id": 0}}],
                                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
                                             {"Sequence": {"id": "B", "type_id": 1}}],
                                    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                                                       "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}},
                 "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
                 "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                           "max_input_chars_per_word": 100, "vocab": words}}
    bpe = {"version": "1.0", "truncation": None, "padding": None,
           "added_tokens": [{"id": 5, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                             "normalized": False, "special": True}],
           "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
           "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
               {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\p{N}{1,3}|\\s+"}, "behavior": "Isolated", "invert": False},
               {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
           "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
           "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
           "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                     "fuse_unk": False, "byte_fallback": False, "vocab": {"h": 0, "e": 1, "he": 2, "l": 3, "hel": 4},
                     "merges": [["h", "e"], "he l"]}}
    llama = json.loads(text(bpe))
    llama["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"},
                                                               {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]}
    llama["pre_tokenizer"] = None
    llama["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "h"}
    put("tokenizer", "wordpiece", text(wordpiece))
    put("tokenizer", "bpe", text(bpe))
    put("tokenizer", "bpe_fallback", text(llama))
    put("tokenizer", "bad_merge", text({**bpe, "model": {**bpe["model"], "merges": ["h q"]}}))
    put("tokenizer", "same_ids", text({**wordpiece, "model": {**wordpiece["model"], "vocab": {"a": 0, "b": 0}}}))


for make in (manifests, safetensors, indices, configs, tokenizers):
    make()
