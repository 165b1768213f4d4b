"""20 optimizer steps under label_smoothing_factor beside transformers' Trainer (file order, no dropout, fp32, 2 micro-batches
of 8, constant rate): MiniLM on SST-2 and a small Llama as a causal LM. The loss of every step, and the evaluation loss of the
trained weights with and without smoothing, within 1e-4."""
import json
import pathlib
import tempfile

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import common

STEPS, BATCH, FACTOR, EVAL_ROWS = 20, 16, 0.2, 64


class Rows(torch.utils.data.Dataset):
    """Nothing is cut off: of a causal LM's long texts shardtune makes several examples where transformers truncates."""

    def __init__(self, tokenizer, rows, is_causal):
        self.examples = [{"ids": tokenizer(text)["input_ids"], "label": label} for text, label in rows]
        self.is_causal = is_causal

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def collate(self, examples):
        """Padded on the right, where neither model looks; padding is no label."""
        def padded(value):
            rows = [torch.tensor(example["ids"]) for example in examples]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        ids = padded(-100)
        labels = ids if self.is_causal else torch.tensor([example["label"] for example in examples])
        return {"input_ids": padded(0), "attention_mask": (ids != -100).long(), "labels": labels}


class RecordingTrainer(Trainer):
    """Keeps the loss of each step with all its digits; the log has four."""
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.micro_losses = []

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.micro_losses.append(loss.item())
        return loss


def theirs(model, tokenizer, rate, is_causal, output_dir):
    arguments = TrainingArguments(
        output_dir=output_dir, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2, per_device_eval_batch_size=EVAL_ROWS, learning_rate=rate, lr_scheduler_type="constant",
        label_smoothing_factor=FACTOR, train_sampling_strategy="sequential", remove_unused_columns=False,
        save_strategy="no", report_to="none", disable_tqdm=True)
    train = Rows(tokenizer, common.sst2("train")[:STEPS * BATCH], is_causal)
    dev = Rows(tokenizer, common.sst2("dev")[:EVAL_ROWS], is_causal)
    trainer = RecordingTrainer(model=model, args=arguments, train_dataset=train, eval_dataset=dev, data_collator=train.collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [sum(trainer.micro_losses[i:i + 2]) for i in range(0, len(trainer.micro_losses), 2)]
    smoothed = trainer.evaluate()["eval_loss"]
    trainer.label_smoother = None  # as without the argument
    return losses, smoothed, trainer.evaluate()["eval_loss"]


def ours(directory, rate, output_dir, ranks, *arguments):
    dev = ["--validation_file", common.SST2 / "dev.tsv", *common.SST2_ARGUMENTS, "--max_eval_samples", EVAL_ROWS,
           "--per_device_eval_batch_size", EVAL_ROWS]
    task = ["--task", arguments[0]]
    common.shardtune("train", "--model_name_or_path", directory, *task, "--train_file", common.SST2 / "train.tsv", *dev,
                     *arguments[1:], "--output_dir", output_dir, "--train_sampling_strategy", "sequential",
                     "--lr_scheduler_type", "constant", "--learning_rate", rate, "--per_device_train_batch_size", BATCH // 2,
                     "--global_batch_size", BATCH, "--max_steps", STEPS, "--logging_steps", "1", "--label_smoothing_factor",
                     FACTOR, "--eval_strategy", "steps", "--eval_steps", STEPS, "--save_strategy", "no", ranks=ranks)
    records = common.read_rows(output_dir / "metrics.jsonl")
    evaluated = [row["eval_loss"] for row in records if "eval_loss" in row]
    command = ["evaluate", "--model_name_or_path", output_dir / "model", *task, *dev]
    smoothed, plain = (json.loads(common.shardtune(*command, *more))["eval_loss"]
                       for more in (["--label_smoothing_factor", FACTOR], []))
    assert len(evaluated) == 1, evaluated
    return common.step_losses(output_dir), evaluated[0], smoothed, plain


def compare(what, own, reference):
    losses, evaluated, smoothed, plain = own
    their_losses, their_smoothed, their_plain = reference
    assert len(losses) == len(their_losses) == STEPS, (len(losses), len(their_losses))
    common.report(f"{what}: largest difference of a step's loss", max(abs(a - b) for a, b in zip(losses, their_losses)), 1e-4)
    common.report(f"{what}: evaluation at the end of training", abs(evaluated - their_smoothed), 1e-4)
    common.report(f"{what}: evaluate with smoothing", abs(smoothed - their_smoothed), 1e-4)
    common.report(f"{what}: evaluate without", abs(plain - their_plain), 1e-4)
    common.report(f"{what}: what smoothing changes", abs(their_smoothed - their_plain), 1e-2, more_is_better=True)


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        minilm = common.save_classifier(folder / "minilm", common.sine_head(2, 384))
        rate = 2e-4
        reference = theirs(common.classifier(minilm), common.tokenizer(minilm), rate, False, folder / "theirs")
        for ranks in (0, 2):
            own = ours(minilm, rate, folder / f"ours{ranks}", ranks, "text-classification", *common.NO_DROPOUT)
            compare(f"MiniLM, {max(1, ranks)} rank(s)", own, reference)
        rate = 1e-3
        model = AutoModelForCausalLM.from_pretrained(common.STORIES, dtype=torch.float32)
        reference = theirs(model, common.tokenizer(common.STORIES), rate, True, folder / "theirs_llama")
        for ranks in (0, 2):
            own = ours(common.STORIES, rate, folder / f"llama{ranks}", ranks, "causal-lm")
            compare(f"llama-stories260K, {max(1, ranks)} rank(s)", own, reference)
    common.finish()


if __name__ == "__main__":
    main()
