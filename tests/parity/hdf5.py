"""h5py and h5dump read every dataset of every shard alike; names, shapes and offsets are enough to put the tensors together
again, and the values equal the exported safetensors bit for bit."""
import json
import math
import pathlib
import subprocess
import tempfile

import h5py
import numpy
from safetensors.numpy import load_file

import common

# Small, because h5dump is started once a dataset; sizes that three ranks do not divide.
CONFIG = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 30522, "hidden_size": 20,
          "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 50, "max_position_embeddings": 65}
FIELDS = ("value", "exp_avg", "exp_avg_sq")


def train(folder, name, *more):
    """The checkpoint of the end and the exported tensors."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    common.shardtune("train", "--config_name", folder / "config.json", "--tokenizer_name", common.MINILM, "--task",
                     "text-classification", "--train_file", common.SST2 / "train.tsv", *common.SST2_ARGUMENTS, "--output_dir",
                     folder / name, "--sharding", "zero3", "--max_steps", "3", *more, ranks=3)
    return folder / name / "checkpoint-3", load_file(folder / name / "model" / "model.safetensors")


def h5dump(shard, name, folder):
    out = folder / "dataset.bin"
    subprocess.run(["h5dump", "-d", name, "-b", "LE", "-o", out, shard], check=True, stdout=subprocess.DEVNULL)
    return out.read_bytes()


def read_shard(shard, tensors, folder):
    """Puts every slice of the shard in its place; returns (datasets, those that h5dump reads otherwise)."""
    count = differing = 0
    with h5py.File(shard) as file:
        datasets = []
        file["parameters"].visititems(lambda name, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        for dataset in datasets:
            count += 1
            values = dataset[:]
            differing += h5dump(shard, dataset.name, folder) != values.tobytes()
            parameter, field = dataset.name.removeprefix("/parameters/").rsplit("/", 1)
            flat = tensors.setdefault((parameter, field), {"shape": tuple(dataset.attrs["global_shape"]), "parts": []})
            assert flat["shape"] == tuple(dataset.attrs["global_shape"]), dataset.name
            assert values.dtype == numpy.float32 and dataset.attrs["numel"] == values.size, dataset.name
            flat["parts"].append((int(dataset.attrs["offset"]), values))
        step = int(file["run"].attrs["step"])
        state = json.loads(file["run/json"][()])
        assert step == state["step"] == 3, (step, state["step"])
    return count, differing


def assemble(tensor):
    """The tensor, or None when its slices overlap or leave holes."""
    position, values = 0, []
    for offset, part in sorted(tensor["parts"], key=lambda item: item[0]):
        if offset != position:
            return None
        position += part.size
        values.append(part)
    return numpy.concatenate(values).reshape(tensor["shape"]) if position == math.prod(tensor["shape"]) else None


def documented(function):
    """The function of docs/checkpoint_format.md, as it stands there."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "checkpoint_format.md").read_text()
    snippet = next(part.split("```")[0] for part in page.split("```python\n")[1:] if f"def {function}(" in part)
    scope = {}
    exec(snippet, scope)
    return scope[function]


def same(tensors, expected):
    """How many differ in any bit, are missing or left over."""
    return len(tensors.keys() ^ expected.keys()) + sum(
        tensors[name].tobytes() != expected[name].tobytes() for name in tensors.keys() & expected.keys())


def check_other_forms(folder):
    """The documented functions on all that a checkpoint may be besides: compressed, with moments in bf16, several slices of a
    tensor in one file."""
    checkpoint, exported = train(folder, "forms", "--checkpoint_compression", "zstd", "--adam_state_dtype", "bf16",
                                 "--ranks_per_file", "2")
    plain = folder / "decompressed"
    plain.mkdir()
    compressed = sorted(checkpoint.glob("shard-*.h5.sz"))
    common.report("compressed files of three ranks, two to a file, that are not there", 2 - len(compressed), 0)
    for shard in compressed:
        documented("decompress")(shard, plain / shard.name.removesuffix(".sz"))
    common.shardtune("checkpoint", "reshard", checkpoint, folder / "resharded", "--shards", "2")
    with h5py.File(plain / compressed[0].name.removesuffix(".sz")) as file:
        keys = [key for group in file["parameters"].values() for key in group]
        moments = {data.id.get_type().get_size() for group in file["parameters"].values() for key, data in group.items()
                   if key.startswith("exp_avg")}
    common.report("second slices of a tensor in one file", keys.count("value.1"), 1, more_is_better=True)
    common.report("moments that are not stored in two bytes", len(moments ^ {2}), 0)
    read = documented("read_model")
    common.report(f"decompressed: tensors that the snippet reads otherwise, of {len(exported)}", same(read(plain), exported), 0)
    for field in FIELDS[1:]:
        ours, theirs = read(plain, field), read(folder / "resharded" / "checkpoint-3", field)
        rounded = sum(bool(numpy.any(value.view(numpy.uint32) & 0xffff)) for value in ours.values())
        common.report(f"{field} in bf16: tensors that differ from those of `checkpoint reshard`, of {len(ours)}", same(ours, theirs), 0)
        common.report(f"{field} in bf16: tensors with numbers that bf16 has not", rounded, 0)
        common.report(f"{field} in bf16: tensors", len(ours), len(exported), more_is_better=True)


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        checkpoint, exported = train(folder, "run")
        shards = sorted(checkpoint.glob("shard-*.h5"))
        common.report("shards of three ranks that are not there", 3 - len(shards), 0)
        tensors, count, differing = {}, 0, 0
        for shard in shards:
            in_shard, wrong = read_shard(shard, tensors, folder)
            count, differing = count + in_shard, differing + wrong
        common.report(f"datasets that h5dump reads otherwise than h5py, of {count}", differing, 0)
        expected = {(name, field) for name in exported for field in FIELDS}
        common.report(f"names that are missing or left over, of {len(expected)}", len(expected ^ tensors.keys()), 0)
        whole = {key: assemble(tensor) for key, tensor in tensors.items()}
        common.report("tensors with holes or overlaps", sum(value is None for value in whole.values()), 0)
        wrong = sum(whole[name, "value"] is None or whole[name, "value"].shape != value.shape or
                    whole[name, "value"].tobytes() != value.tobytes() for name, value in exported.items())
        common.report(f"tensors that differ from the exported safetensors in any bit, of {len(exported)}", wrong, 0)
        wrong = same(documented("read_model")(checkpoint), exported)
        common.report(f"tensors that the documented snippet reads otherwise, of {len(exported)}", wrong, 0)
        moved = sum(bool(numpy.any(whole[name, "exp_avg_sq"] > 0)) for name in exported)
        common.report("parameters with optimizer state", moved, len(exported), more_is_better=True)
        check_other_forms(folder)
    common.finish()


if __name__ == "__main__":
    main()
