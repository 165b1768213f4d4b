#pragma once
// The configuration of a run as one value. Names are Hugging Face's; the launcher fills it, validate() checks it.
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace shardtune {

enum class Interval { no, steps, epoch };

struct ModelOptions {
  std::string model_name_or_path;   // directory in Hugging Face layout, or a checkpoint-<step> directory
  std::string config_name;          // config.json (or its directory): random initialisation, no weights read
  std::string tokenizer_name;       // directory of tokenizer.json; empty = the model's
  std::string task = "text-classification";  // or "causal-lm"
  std::map<std::string, double> dropout;     // hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout, attention_dropout
  std::vector<std::string> freeze;           // parameter name patterns with * and ?: not trained
};

struct DataOptions {
  std::string train_file, validation_file, test_file;
  std::string text_column = "text", text_pair_column, label_column = "label";
  std::vector<std::string> column_names;     // for CSV/TSV files without a header line
  std::int64_t max_seq_length = 0;           // 0 = what model and tokenizer allow
  std::int64_t max_train_samples = 0, max_eval_samples = 0;  // 0 = all
};

inline constexpr std::int64_t kMostThreads = 1024;  // of a rank

struct TrainOptions {
  std::string output_dir;
  bool overwrite_output_dir = false;
  std::string resume_from_checkpoint;        // empty, "true", "auto" or a checkpoint directory
  std::string sharding = "ddp";
  std::optional<bool> reshard_after_forward;  // zero3, hsdp: false keeps weights until the backward pass is done
  std::int64_t hsdp_shard_size = 0;          // ranks that share one copy; 0 = the ranks of a node
  std::string fsdp;                          // Hugging Face's spelling of a plan, instead of `sharding`
  std::string reduce_dtype = "fp32";         // or "bf16": of the gradients that travel
  bool share_frozen_weights = false;         // ddp, zero1, zero2: one copy per node
  std::int64_t ddp_bucket_cap_mb = 0;        // MiB of a communication buffer; 0 = measured
  std::string adam_state_dtype = "fp32";     // or "bf16"
  std::string reduction = "tree";            // or "fast"
  std::string loss_normalization = "global";
  double label_smoothing_factor = 0.0;  // of the loss in training and in evaluation, as in Hugging Face
  std::int64_t per_device_train_batch_size = 8, per_device_eval_batch_size = 8;
  std::int64_t gradient_accumulation_steps = 1;
  std::int64_t global_batch_size = 0;        // 0 = per_device x accumulation x ranks of the first start
  std::int64_t max_tokens_per_batch = 0;
  double num_train_epochs = 3.0;
  std::int64_t max_steps = -1;
  double learning_rate = 5e-5, weight_decay = 0.0, adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  double max_grad_norm = 1.0;
  std::string optim = "adamw_torch";
  std::string optim_args;                    // sgd: "momentum=0.9,nesterov=true"
  std::string lr_scheduler_type = "linear";  // linear, constant, constant_with_warmup
  double warmup_steps = 0;                   // below 1: a share of all steps
  double warmup_ratio = 0;
  bool bf16 = false;
  bool fp16 = false;
  bool gradient_checkpointing = false;
  std::int64_t gradient_checkpointing_every = 1;       // every n-th layer
  std::string gradient_checkpointing_mode = "full";    // or "selective": keep attention's output
  std::int64_t activation_memory_budget = 0;           // MiB; > 0: recompute only what does not fit
  std::int64_t seed = 42;
  std::optional<std::int64_t> data_seed;
  std::string train_sampling_strategy = "random";
  bool dataloader_drop_last = false;
  Interval logging_strategy = Interval::steps;
  double logging_steps = 500;                // below 1: a share of all steps
  bool logging_first_step = false;
  Interval eval_strategy = Interval::no;
  double eval_steps = 0;                     // 0 = logging_steps
  bool eval_on_start = false;
  Interval save_strategy = Interval::steps;
  double save_steps = 500;
  std::int64_t save_total_limit = 0;         // 0 = keep all
  bool async_save = true;                    // training goes on while a checkpoint is written
  std::int64_t checkpoint_staging_mb = 1024; // most memory per rank for copies of what training changes meanwhile
  std::int64_t ranks_per_file = 0;           // ranks of one host that write one checkpoint file together; 0 = chosen
  std::string checkpoint_compression = "none";  // or "zstd"
  std::string checkpoint_local_dir;          // disk of each node that saves go to first; empty = none
  std::string on_save_error = "continue";    // or "stop"
  std::string on_save_overlap = "wait";      // or "skip"
  bool load_best_model_at_end = false;       // a new best evaluation is saved even where no save is due
  std::string metric_for_best_model;         // empty = "loss"
  std::optional<bool> greater_is_better;
  bool log_memory = false;
  bool disable_tqdm = false;
  std::string log_level = "info";
  std::int64_t num_threads = 0;              // threads per rank, 0 = cores of the affinity mask / local ranks
};

// For evaluate, predict and score.
struct InferenceOptions {
  std::string input;            // file of rows; empty for evaluate = test_file, else validation_file
  std::string output;           // empty or "-" = standard output
  std::string full_logits;      // score: safetensors file of logits.<index> [n, V], fp32
  std::string save_gradients;   // score: safetensors file of the gradient of the file's mean loss by parameter name
};

struct RunOptions {
  ModelOptions model;
  DataOptions data;
  TrainOptions train;
  // Every option with its resolved value as text, in table order; filled by the launcher. Compared between ranks at
  // start, written beside the results, and the names of those that the user set explicitly.
  std::vector<std::pair<std::string, std::string>> resolved;
  std::vector<std::string> explicitly_set;
};

// Where eval_steps is not given it is logging_steps.
double effective_eval_steps(const TrainOptions& train);
// `resolved` as a configuration file; options without a value are left out unless they were set so.
std::string resolved_text(const RunOptions& options);
// Whether the command line or the configuration file names the option.
bool is_explicitly_set(const RunOptions& options, const std::string& name);

struct PlanRequest;
// What --sharding or --fsdp ask for, with their companions. Error{config} for a --fsdp that has no counterpart.
PlanRequest plan_request(const TrainOptions& train);

// Error{config} naming option, value and remedy for everything that can be judged without opening a file.
// command: train, evaluate, predict or score; what it needs is checked.
void validate(const RunOptions& options, const std::string& command);

}  // namespace shardtune
