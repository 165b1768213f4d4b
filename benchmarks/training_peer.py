"""One run of a peer of training.py, in a process of its own: training_peer.py REQUEST, a JSON object of

    case, peer     names of training_cases.py
    folder         of the model and the rows
    output         folder for result.json: losses and useful tokens of every step
    rows           how many of the rows; every step's are the next of them, and after the last comes the first again
    uncounted      steps before those that count, which go over all rows once
    rate           learning rate

Each end of a step is a line "step N/" on standard error.
"""
import json
import math
import pathlib
import sys

import common
import torch
import training_cases
import transformers


def order(lengths, num_rows, batch, groups):
    """Of the first `num_rows`; grouped as the Trainer's group_by_length groups the whole data set."""
    if not groups:
        return list(range(num_rows))
    from transformers.trainer_pt_utils import get_length_grouped_indices
    num_groups = max(min(len(lengths) // (batch * 4), 50), 1)
    return get_length_grouped_indices(lengths[:num_rows], batch, num_groups, generator=torch.Generator().manual_seed(0))


def minilm():
    """(tokenizer, model, all rows, collator): None is the Trainer's own collator, which pads to the longest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(common.MINILM)
    rows = [{**tokenizer(text, truncation=True, max_length=128), "label": label} for text, label in common.sst2("train")]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(common.MINILM, dtype=torch.float32)
    return tokenizer, model, rows, None


def causal_lm(case, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    # The first label is no target; where it is not -100, the Trainer counts it as one when it divides by the number of targets.
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in (row["input_ids"] for row in common.read_rows(folder / "rows.jsonl"))]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if case.is_varied:
        return tokenizer, model, rows, transformers.DataCollatorForSeq2Seq(tokenizer)
    rows = [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]
    return tokenizer, model, rows, transformers.default_data_collator


def options(case, request, parts):
    """What every peer is told; a step is taken in so many micro-batches."""
    return {"output_dir": request["output"], "use_cpu": True, "bf16": case.bf16, "learning_rate": request["rate"],
            "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "train_sampling_strategy": "sequential", "gradient_accumulation_steps": parts}


def make_trainer(case, request, callback):
    peer, parts = training_cases.PEERS[request["peer"]], case.parts.get(request["peer"], 1)
    tokenizer, model, rows, collator = minilm() if case.shape is None else causal_lm(case, pathlib.Path(request["folder"]))
    lengths = [len(row["input_ids"]) for row in rows]
    rows = [rows[i] for i in order(lengths, request["rows"], case.batch, peer.groups and case.is_varied)]
    more = {"model": model, "processing_class": tokenizer, "callbacks": [callback]}
    if peer.packs:
        return packing_trainer(rows, options(case, request, parts), more)
    arguments = transformers.TrainingArguments(**options(case, request, parts), torch_compile=peer.compiles,
                                               per_device_train_batch_size=case.batch // parts)
    return transformers.Trainer(args=arguments, train_dataset=rows, data_collator=collator, **more)


def packing_trainer(rows, arguments, more):
    """Each micro-batch is one pack of rows."""
    import datasets
    import trl
    arguments = trl.SFTConfig(**arguments, packing=True, packing_strategy="bfd", max_length=training_cases.TOKENS,
                              per_device_train_batch_size=1, gradient_checkpointing=False)  # which costs time; it is on by default
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
    return trl.SFTTrainer(args=arguments, train_dataset=data, **more)


def main():
    request = json.loads(sys.argv[1])
    case = training_cases.CASES[request["case"]]
    tokens, now = [], []

    class Announce(transformers.TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            tokens.append(sum(now))
            now.clear()
            print(f"step {state.global_step}/", file=sys.stderr, flush=True)

    trainer = make_trainer(case, request, Announce())
    rows_a_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    trainer.args.max_steps = request["uncounted"] + math.ceil(len(trainer.train_dataset) / rows_a_step)
    original = trainer.training_step

    def counted_step(model, inputs, *rest, **more):
        now.append(training_cases.useful_tokens(inputs))
        return original(model, inputs, *rest, **more)

    trainer.training_step = counted_step
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    pathlib.Path(request["output"], "result.json").write_text(json.dumps({"losses": losses, "tokens": tokens}))


if __name__ == "__main__":
    main()
