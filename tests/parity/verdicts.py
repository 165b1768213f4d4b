"""100,000 mutants of safetensors files: ours accepts and refuses the same ones as the reference implementation.

Mutations know the format (values, shapes, offsets, dtypes, keys, nesting, numbers in odd spellings, header length) and the
bytes (flips, cuts, insertions). VERDICT_MUTANTS and VERDICT_SEED choose others.
"""
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile

import safetensors

MUTANTS = int(os.environ.get("VERDICT_MUTANTS", 100_000))
SEED = int(os.environ.get("VERDICT_SEED", 1))
PROGRAM = pathlib.Path(os.environ["SHARDTUNE_BINARY"]).parent / "fuzz" / "safetensors_verdicts"
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4,
         "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
ODD = ["0", "1", "-0", "-1", "4.0", "1e0", "1E2", "01", "4294967296", "9223372036854775807", "9223372036854775808",
       "18446744073709551615", "18446744073709551616", "1e400", "null", "true", "\"4\"", "[]", "{}", "[1]", "NaN"]
TEXTS = ["\"\"", "\"a\"", "\"F32\"", "\"f32\"", "\"F33\"", "\"__metadata__\"", "\"\\u0000\"", "\"\\ud800\"", "\"\\ud83d\\ude00\"", "\"\\x\"",
         "\"\u00e4\"", "\"a\\/b\"", "1", "null"]


class Raw(str):
    """JSON text that stands for itself."""


def dump(value):
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{key if isinstance(key, Raw) else json.dumps(key)}:{dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def good(rng):
    header, at = {}, 0
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": "pt"}
    for i in range(rng.randrange(5)):
        dtype = rng.choice(list(SIZES))
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        size = SIZES[dtype]
        for extent in shape:
            size *= extent
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if rng.random() < 0.3:
        header = dict(rng.sample(list(header.items()), len(header)))
    return header, at


def mutate_header(rng, header):
    entries = [value for value in header.values() if isinstance(value, dict) and value]
    if not entries:
        return
    entry = rng.choice(entries)
    kind = rng.randrange(9)
    lists = [value for value in entry.values() if isinstance(value, list)]
    if kind == 0 and lists:
        values = rng.choice(lists)
        if values:
            values[rng.randrange(len(values))] = Raw(rng.choice(ODD))
    elif kind == 1 and lists:
        values = rng.choice(lists)
        values.insert(rng.randrange(len(values) + 1), Raw(rng.choice(ODD)))
    elif kind == 2 and lists:
        values = rng.choice(lists)
        if values:
            values.pop(rng.randrange(len(values)))
    elif kind == 3:
        entry[rng.choice(list(entry))] = Raw(rng.choice(ODD + TEXTS))
    elif kind == 4:
        entry.pop(rng.choice(list(entry)))
    elif kind == 5:
        entry[Raw(rng.choice(TEXTS[:12]))] = Raw(rng.choice(ODD + TEXTS))
    elif kind == 6:
        header[Raw(rng.choice(TEXTS[:12]))] = rng.choice([Raw(rng.choice(ODD)), dict(entry), {"format": Raw(rng.choice(ODD + TEXTS))}])
    elif kind == 7:
        entry["dtype"] = rng.choice(list(SIZES) + ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "", "F128"])
    elif lists:
        values = rng.choice(lists)
        for i, value in enumerate(values):
            if isinstance(value, int):
                values[i] = value + rng.choice([-1, 1, 4, 8])


def mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind, at = rng.randrange(6), rng.randrange(len(data)) if data else 0
        if not data or kind == 0:
            data.insert(at, rng.randrange(256))
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at]
        elif kind == 3:
            data[at] = rng.choice(b'{}[]":,0129-.eE \n\t\\u\x00\xff')
        elif kind == 4:
            end = min(len(data), at + rng.randrange(1, 9))
            data[at:at] = data[at:end]
        else:
            del data[at:]
    return bytes(data)


def mutant(rng):
    header, size = good(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        mutate_header(rng, header)
    text = dump(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        text += b" " * rng.randrange(9)
    if rng.random() < 0.05:
        text = rng.choice([b" ", b"\n", b"\xef\xbb\xbf", b"\x00"]) + text
    if rng.random() < 0.25:
        text = mutate_bytes(rng, text)
    if rng.random() < 0.1:
        size = max(0, size + rng.choice([-8, -1, 1, 8]))
    data = struct.pack("<Q", len(text)) + text + bytes(size)
    if rng.random() < 0.1:
        data = mutate_bytes(rng, data)
    if rng.random() < 0.03:
        data = struct.pack("<Q", rng.choice([0, 1, len(data), 100_000_001, 2**63, 2**64 - 1])) + data[8:]
    return data


def reference(data):
    try:
        safetensors.deserialize(data)
        return True, ""
    except Exception as error:  # noqa: BLE001 - whatever it raises is a refusal
        return False, str(error)


def main():
    rng = random.Random(SEED)
    mutants = [mutant(rng) for _ in range(MUTANTS)]
    with tempfile.TemporaryFile() as stream:
        for data in mutants:
            stream.write(struct.pack("<Q", len(data)) + data)
        stream.seek(0)
        result = subprocess.run([PROGRAM], stdin=stream, capture_output=True, check=True)
    ours = result.stdout.decode("utf-8", "replace").split("\n")[:-1]
    assert len(ours) == MUTANTS, (len(ours), MUTANTS)
    accepted = differing = too_large = twice = 0
    for data, line in zip(mutants, ours):
        wanted, reason = reference(data)
        accepted += wanted
        if wanted != line.startswith("accept"):
            # Extents, or a product of them, beyond int64 in a tensor without elements: legal, and no tensor can have it.
            number = re.search(r"the shape of tensor .* must be a non-negative integer, got (\d+);", line)
            overflow = re.search(r"the shape of tensor .* overflows;", line)
            if wanted and (overflow or number and int(number[1]) >= 2**63):
                too_large += 1
                continue
            # The format forbids a key twice; the reference takes the last one.
            if wanted and "appears twice in one object" in line:
                twice += 1
                continue
            differing += 1
            if differing <= 20:
                print(f"reference {'accepts' if wanted else 'refuses'} {reason!r}\n  ours: {line[:300]}\n  {data[:200]!r}")
    assert MUTANTS / 20 < accepted < MUTANTS * 19 / 20, f"{accepted} accepted: such mutants show nothing"
    good_enough = differing == 0
    print(f"{'ok  ' if good_enough else 'MISS'} verdicts on {MUTANTS} mutants ({accepted} accepted), differing: {differing} (bar: <= 0); "
          f"{too_large} with extents beyond int64 and no elements, {twice} with a key twice are refused by ours alone")
    sys.exit(0 if good_enough else 1)


main()
