#include "launcher/option_rows.hpp"

namespace shardtune {
namespace {

const std::vector<std::string> kTrain{"train"};
const std::vector<std::string> kInference{"evaluate", "predict", "score"};
const std::vector<std::string> kRun{"train", "evaluate", "predict", "score"};

void add_model_rows(OptionTable& table, ModelOptions& model) {
  table.begin_group("Model", kRun);
  table.add("model_name_or_path", model.model_name_or_path, "DIR", "Hugging Face model directory, or a checkpoint-<step> or output directory of shardtune");
  table.add("config_name", model.config_name, "FILE", "config.json (or its directory): random weights, for experiments with shapes");
  table.add("tokenizer_name", model.tokenizer_name, "DIR", "directory of tokenizer.json; default: the model's");
  table.add("task", model.task, "TASK", "text-classification or causal-lm");
  table.begin_group("Model", kTrain);
  for (const char* name : {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout",
                           "embd_pdrop", "resid_pdrop", "attn_pdrop"})
    table.add_to_map(name, model.dropout, "overrides the field of config.json");
  table.add("freeze", model.freeze, "PATTERN", "parameters not to train, by name with * and ? ('bert.embeddings.*')");
}

void add_data_rows(OptionTable& table, DataOptions& data) {
  table.begin_group("Data", kTrain);
  table.add("train_file", data.train_file, "FILE", ".jsonl, .json, .csv, .tsv or .txt");
  table.add("max_train_samples", data.max_train_samples, "use the first N rows only; 0 = all");
  table.begin_group("Data", {"train", "evaluate"});
  table.add("validation_file", data.validation_file, "FILE", "for evaluation");
  table.begin_group("Data", {"evaluate"});
  table.add("test_file", data.test_file, "FILE", "what `evaluate` reads without --input");
  table.begin_group("Data", {"train", "evaluate", "score"});
  table.add("label_column", data.label_column, "NAME", "column of the class").aliases = {"label_column_name"};
  table.begin_group("Data", kRun);
  table.add("text_column", data.text_column, "NAME", "column of the text").aliases = {"text_column_name", "sentence_column"};
  table.add("text_pair_column", data.text_pair_column, "NAME", "column of the second text of a pair task");
  table.add("column_names", data.column_names, "A,B,...", "names of the columns of CSV and TSV files without a header line");
  table.add("max_seq_length", data.max_seq_length, "longest example in tokens; 0 = what model and tokenizer allow").aliases = {"max_length", "block_size"};
  table.add("max_eval_samples", data.max_eval_samples, "use the first N rows only; 0 = all").aliases = {"max_predict_samples"};
}

void add_batch_rows(OptionTable& table, TrainOptions& train) {
  table.begin_group("Training", kTrain);
  table.add("output_dir", train.output_dir, "DIR", "checkpoints, metrics and the trained model go here");
  table.add("overwrite_output_dir", train.overwrite_output_dir, "set checkpoints that are there aside and start anew");
  table.add("resume_from_checkpoint", train.resume_from_checkpoint, "true|auto|DIR", "true: newest checkpoint in output_dir; auto: that, or start");
  table.add("per_device_train_batch_size", train.per_device_train_batch_size, "examples of a micro-batch");
  table.add("gradient_accumulation_steps", train.gradient_accumulation_steps, "micro-batches per rank and optimizer step at the first start");
  table.add("global_batch_size", train.global_batch_size, "examples of an optimizer step; 0 = the product of the two above and the ranks of the first start");
  table.add("max_tokens_per_batch", train.max_tokens_per_batch, "cut micro-batches finer at this many tokens; 0 = never");
  table.add("num_train_epochs", train.num_train_epochs, "passes over the training file");
  table.add("max_steps", train.max_steps, "optimizer steps instead of epochs; -1 = by epochs");
  table.add("seed", train.seed, "of dropout, new weights and data order");
  table.add("data_seed", train.data_seed, "of the data order; default: seed");
  table.add("train_sampling_strategy", train.train_sampling_strategy, "random|sequential", "sequential keeps the file's order");
  table.add("dataloader_drop_last", train.dataloader_drop_last, "drop the incomplete last step of an epoch");
  table.add("loss_normalization", train.loss_normalization, "global", "loss = sum over the labelled tokens (or examples) of the step / their number");
  table.begin_group("Training", {"train", "evaluate"});
  table.add("label_smoothing_factor", train.label_smoothing_factor, "share of the target spread evenly over all classes; in eval_loss, too");
  table.begin_group("Training", kInference);
  table.add("seed", train.seed, "of weights that the model's files do not hold");
}

void add_optimizer_rows(OptionTable& table, TrainOptions& train) {
  table.begin_group("Optimizer", kTrain);
  table.add("optim", train.optim, "NAME", "adamw_torch (adamw_torch_fused is the same) or sgd");
  table.add("optim_args", train.optim_args, "A=B,...", "of sgd: momentum=0.9,nesterov=true");
  table.add("learning_rate", train.learning_rate, "peak learning rate");
  table.add("weight_decay", train.weight_decay, "not applied to biases and normalisation weights");
  table.add("adam_beta1", train.adam_beta1, "");
  table.add("adam_beta2", train.adam_beta2, "");
  table.add("adam_epsilon", train.adam_epsilon, "");
  table.add("max_grad_norm", train.max_grad_norm, "clip the global gradient norm; 0 = off");
  table.add("lr_scheduler_type", train.lr_scheduler_type, "NAME", "linear, constant or constant_with_warmup");
  table.add("warmup_steps", train.warmup_steps, "steps, or below 1 a share of all steps");
  table.add("warmup_ratio", train.warmup_ratio, "share of all steps");
}

void add_logging_rows(OptionTable& table, TrainOptions& train) {
  table.begin_group("Logging, evaluation, saving", kTrain);
  table.add("logging_strategy", train.logging_strategy, "when to write metrics");
  table.add("logging_steps", train.logging_steps, "steps, or below 1 a share of all steps");
  table.add("logging_first_step", train.logging_first_step, "also log step 1");
  table.add("eval_strategy", train.eval_strategy, "when to evaluate on validation_file").aliases = {"evaluation_strategy"};
  table.add("eval_steps", train.eval_steps, "steps, or below 1 a share; 0 = logging_steps");
  table.add("eval_on_start", train.eval_on_start, "evaluate before training");
  table.add("save_strategy", train.save_strategy, "when to write checkpoints");
  table.add("save_steps", train.save_steps, "steps, or below 1 a share of all steps");
  table.add("async_save", train.async_save, "training goes on while a checkpoint is written");
  table.add("checkpoint_staging_mb", train.checkpoint_staging_mb, "MiB per rank for copies of what training changes during a save");
  table.add("ranks_per_file", train.ranks_per_file, "ranks of one host that write one checkpoint file together; 0 = one, more where there would be over 256 files");
  table.add("checkpoint_compression", train.checkpoint_compression, "none|zstd", "without loss; about a sixth smaller, for CPU time");
  table.add("checkpoint_local_dir", train.checkpoint_local_dir, "DIR", "fast disk of each node: saves go there first and are drained to output_dir");
  table.add("on_save_overlap", train.on_save_overlap, "wait|skip", "a save is due while one is under way: wait for that, or leave the new one out");
  table.add("on_save_error", train.on_save_error, "continue|stop", "a failed save: go on and try the next one, or end the run");
  table.add("save_total_limit", train.save_total_limit, "checkpoints to keep, the best among them; 0 = all");
  table.add("load_best_model_at_end", train.load_best_model_at_end, "export the best evaluated weights instead of the last; each new best is saved");
  table.add("metric_for_best_model", train.metric_for_best_model, "NAME", "default: loss");
  table.add("greater_is_better", train.greater_is_better, "default: true unless the metric's name ends in loss");
  table.add("log_memory", train.log_memory, "with each logged step say what holds memory");
  table.add("disable_tqdm", train.disable_tqdm, "plain lines instead of a progress bar");
  table.begin_group("Logging, evaluation, saving", kRun);
  table.add("log_level", train.log_level, "LEVEL", "debug, info, warn, error");
}

void add_parallel_rows(OptionTable& table, TrainOptions& train) {
  table.begin_group("Parallelism and memory", kRun);
  table.add("sharding", train.sharding, "PLAN", "ddp (all on every rank), zero1 (optimizer state and master weights sharded), zero2 (gradients, too), zero3 (weights, too), hsdp (zero3 within nodes, copies across them)");
  table.add("fsdp", train.fsdp, "'full_shard auto_wrap'", "Hugging Face's spelling of a plan, instead of sharding");
  table.add("reshard_after_forward", train.reshard_after_forward, "zero3, hsdp: false keeps weights until the backward pass is done; default true");
  table.add("hsdp_shard_size", train.hsdp_shard_size, "ranks that share one copy of the weights; 0 = the ranks of a node");
  table.add("bf16", train.bf16, "compute in bfloat16, keep fp32 master weights");
  table.add("per_device_eval_batch_size", train.per_device_eval_batch_size, "examples of a forward pass without training");
  table.add("num_threads", train.num_threads, "threads per rank; 0 = OMP_NUM_THREADS, or the cores this rank may use");
  table.begin_group("Parallelism and memory", kTrain);
  table.add("fp16", train.fp16, "compute in float16 with a dynamic loss scale");
  table.add("reduce_dtype", train.reduce_dtype, "fp32|bf16", "of gradients on their way between ranks; sums are fp32");
  table.add("share_frozen_weights", train.share_frozen_weights, "ddp, zero1, zero2: the ranks of a node hold one copy of frozen weights");
  table.add("ddp_bucket_cap_mb", train.ddp_bucket_cap_mb, "MiB of a buffer that gradients and weights travel through, under every plan; 0 = measured at the first start on a host");
  table.add("adam_state_dtype", train.adam_state_dtype, "fp32|bf16", "of AdamW's moments; bf16 saves 4 bytes a parameter");
  table.add("gradient_checkpointing", train.gradient_checkpointing, "recompute layers in the backward pass");
  table.add("gradient_checkpointing_every", train.gradient_checkpointing_every, "recompute every n-th layer only");
  table.add("gradient_checkpointing_mode", train.gradient_checkpointing_mode, "full|selective", "selective keeps the output of attention");
  table.add("activation_memory_budget", train.activation_memory_budget, "MiB of activations a rank may keep; only layers beyond it are recomputed; 0 = off");
  table.add("reduction", train.reduction, "tree|fast", "tree: the same bits at any number of ranks; fast: the same bits at the same number under the same plan only");
}

void add_inference_rows(OptionTable& table, InferenceOptions& inference) {
  table.begin_group("Input and output", kInference);
  table.add("input", inference.input, "FILE", "rows to read");
  table.add("output", inference.output, "FILE", "where results go; default: standard output");
  table.begin_group("Input and output", {"score"});
  table.add("full_logits", inference.full_logits, "FILE", "safetensors with all logits of each row; one rank only");
  table.add("save_gradients", inference.save_gradients, "FILE", "safetensors with the gradient of the mean loss of all rows");
}

void add_tokenize_rows(OptionTable& table, Invocation& invocation) {
  TokenizeOptions& tokenize = invocation.tokenize;
  table.begin_group("Tokenizing", {"tokenize"});
  table.add("tokenizer", invocation.run.model.tokenizer_name, "DIR", "directory of tokenizer.json").aliases = {"tokenizer_name", "model_name_or_path"};
  table.add("input", tokenize.input, "FILE", "rows to read; a .txt file gives one row a line");
  table.add("output", tokenize.output, "FILE", "JSONL; default: standard output");
  table.add("text_column", tokenize.text_column, "NAME", "column of the text");
  table.add("text_pair_column", tokenize.text_pair_column, "NAME", "column of a second text; rows may lack it");
  table.add("max_length", tokenize.max_length, "truncate to N tokens; 0 = never").aliases = {"max_seq_length"};
  table.add("add_special_tokens", tokenize.add_special_tokens, "[CLS], [SEP], <s> ... as the tokenizer's post-processor says");
}

}  // namespace

OptionTable make_option_table(Invocation& invocation) {
  OptionTable table;
  add_inference_rows(table, invocation.inference);
  add_model_rows(table, invocation.run.model);
  add_data_rows(table, invocation.run.data);
  add_batch_rows(table, invocation.run.train);
  add_optimizer_rows(table, invocation.run.train);
  add_parallel_rows(table, invocation.run.train);
  add_logging_rows(table, invocation.run.train);
  add_tokenize_rows(table, invocation);
  table.begin_group("Checkpoint tools", {"checkpoint"});
  table.add("format", invocation.checkpoint.format, "safetensors", "export: the format of the weights");
  table.add("dtype", invocation.checkpoint.dtype, "TYPE", "export: float32 or bfloat16 (bf16)");
  table.add("max_shard_size", invocation.checkpoint.max_shard_size, "SIZE", "export: start a new file at this size, such as 5GB");
  table.add("shards", invocation.checkpoint.shards, "reshard: number of files");
  table.add("keep", invocation.checkpoint.keep, "prune: checkpoints to keep");
  table.add("tensor", invocation.checkpoint.tensor, "NAME", "inspect: statistics of this parameter's values and optimizer state");
  return table;
}

}  // namespace shardtune
