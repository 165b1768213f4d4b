"""Tokenizing beside Hugging Face's tokenizers: python compare.py BENCHMARK_TOKENIZER [--cases NAME,...] [--repeats N] [--json FILE]
Run through scripts/parity --python, which has the library.

Texts to ids with special tokens, on one thread, as a rank's loader does it: `wordpiece`, MiniLM's tokenizer on the sentences of
SST-2; `bpe`, GPT-2's on the paragraphs of tinyshakespeare. The peer is the library's `encode_batch_fast` (no offsets), all texts in
one call, in a process with TOKENIZERS_PARALLELISM off and a malloc that keeps its memory, as ours does. Each side starts anew for each
repeat, in turn; loading the tokenizer is not counted. The ids of both must be the same, byte by byte. Aim: not slower.
"""
import argparse
import json
import lzma
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import results
from training_cases import KEEP_MEMORY

CASES = ("wordpiece", "bpe")
AIM = 1  # times as fast


def prepare(case, folder):
    """The case's tokenizer and texts, as files in `folder`; returns the number of characters."""
    import common
    if case not in CASES:
        sys.exit(f"--cases: there is no '{case}'; choose from {', '.join(CASES)}")
    if case == "wordpiece":
        tokenizer = (common.MINILM / "tokenizer.json").read_bytes()
        texts = [text for text, _ in common.sst2("train")]
    else:
        tokenizer = lzma.decompress((common.DATA / "tokenizers" / "gpt2" / "tokenizer.json.xz").read_bytes())
        with lzma.open(common.DATA / "data" / "tinyshakespeare" / "input.txt.xz", "rt", encoding="utf-8") as handle:
            texts = handle.read().split("\n\n")
    # Neither side is to cut or pad, whatever the file says.
    settings = json.loads(tokenizer) | {"truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(settings), "utf-8")
    (folder / "texts.json").write_text(json.dumps(texts), "utf-8")
    return sum(map(len, texts))


def run_peer(folder):
    """What the peer's process does."""
    import time

    import numpy
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = json.loads((folder / "texts.json").read_text("utf-8"))
    start = time.perf_counter()
    encodings = tokenizer.encode_batch_fast(texts)
    seconds = time.perf_counter() - start
    (folder / "peer").write_bytes(b"".join(numpy.asarray(encoding.ids, numpy.int32).tobytes() for encoding in encodings))
    print(f"{seconds:.6f}")


def seconds(command, **variables):
    result = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | variables)
    if result.returncode != 0:
        sys.exit(f"exit code {result.returncode} of: {' '.join(map(str, command))}\n{result.stderr[-3000:]}")
    return float(result.stdout)


def main():
    if sys.argv[1:2] == ["--peer"]:
        run_peer(pathlib.Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    results.add_json_option(parser)
    options = parser.parse_args()
    figures = results.Figures("tokenizer", options.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for case in options.cases.split(","):
            millions = prepare(case, folder) / 1e6
            own, peer = [], []
            for _ in range(options.repeats):
                own.append([millions / seconds([options.program, folder, folder / "texts.json", folder / "own"])])
                peer.append([millions / seconds([sys.executable, __file__, "--peer", folder], TOKENIZERS_PARALLELISM="false", **KEEP_MEMORY)])
                if (folder / "own").read_bytes() != (folder / "peer").read_bytes():
                    sys.exit(f"{case}: the ids of both sides differ")
            figures.add(f"{case}, {millions:.2f} million characters, one thread", "million characters/s", own, peer=peer,
                        beside="tokenizers, encode_batch_fast", aim=AIM)
    figures.finish()


if __name__ == "__main__":
    main()
