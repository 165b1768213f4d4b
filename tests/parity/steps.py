"""50 optimizer steps of MiniLM on SST-2 (file order, dropout 0, fp32, batch 32, constant 5e-5): the loss of every step
within 1e-4 of transformers, live, and of the stored trace."""
import json
import pathlib
import tempfile

import torch

import common

STEPS, BATCH, RATE = 50, 32, 5e-5


def theirs(directory):
    model = common.classifier(directory).train()
    tokenizer = common.tokenizer(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rows, losses = common.sst2("train"), []
    for step in range(STEPS):
        part = rows[step * BATCH:(step + 1) * BATCH]
        batch = tokenizer([text for text, _ in part], padding=True, truncation=True, max_length=128, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([label for _, label in part])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ours(directory, output_dir, ranks, *arguments):
    common.shardtune("train", "--model_name_or_path", directory, "--task", "text-classification", "--train_file",
                     common.SST2 / "train.tsv", *common.SST2_ARGUMENTS, *common.NO_DROPOUT, "--output_dir", output_dir,
                     "--train_sampling_strategy", "sequential", "--lr_scheduler_type", "constant", "--learning_rate", RATE,
                     "--max_seq_length", "128", "--global_batch_size", BATCH, "--max_steps", STEPS, "--logging_steps", "1",
                     "--save_strategy", "no", *arguments, ranks=ranks)
    return common.step_losses(output_dir)


def compare(what, losses, reference):
    assert len(losses) == len(reference) == STEPS, (len(losses), len(reference))
    common.report(f"{what}: largest difference of a step's loss", max(abs(a - b) for a, b in zip(losses, reference)), 1e-4)


def main():
    trace = json.loads((common.DATA / "reference" / "minilm_sst2_50_steps.json").read_text())["trace"]
    stored = [row["loss"] for row in trace]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        common.save_classifier(folder / "model", common.sine_head(2, 384))
        live = theirs(folder / "model")
        compare("transformers now against the stored trace", live, stored)
        alone = ours(folder / "model", folder / "alone", 0, "--per_device_train_batch_size", "32")
        compare("1 rank against transformers now", alone, live)
        compare("1 rank against the stored trace", alone, stored)
        sharded = ours(folder / "model", folder / "sharded", 2, "--per_device_train_batch_size", "8", "--sharding", "zero3",
                       "--gradient_checkpointing", "true")
        compare("2 ranks, zero3, checkpointing, 4 micro-batches against transformers now", sharded, live)
    common.finish()


if __name__ == "__main__":
    main()
