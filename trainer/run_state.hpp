#pragma once
// What a run is (identity: fixed at its first start) and where it stands (saved in every checkpoint).
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "data/loader.hpp"
#include "trainer/loss_scaler.hpp"
#include "trainer/options.hpp"

namespace shardtune {

class Communicator;

// Everything the result depends on besides weights and data content; the number of ranks is not among it.
struct RunIdentity {
  std::string run_id;                        // random, for names of rejected checkpoints
  std::string task;
  std::string model_hash;                    // of the model configuration
  std::vector<std::string> labels;
  std::string data_hash;                     // size and order-independent of ranks: rows of the training file
  std::int64_t global_batch_size = 0, per_device_train_batch_size = 0, gradient_accumulation_steps = 0;
  std::int64_t max_tokens_per_batch = 0, max_seq_length = 0;
  std::int64_t seed = 0, data_seed = 0;
  std::string train_sampling_strategy;
  bool dataloader_drop_last = false;
  std::string optimizer = "adamw";           // optimizer_family(): whose state the checkpoints hold
  double label_smoothing_factor = 0.0;

  nlohmann::json to_json() const;
  static RunIdentity from_json(const nlohmann::json& json, const std::string& origin);
};

// Fills in what a fresh start decides: HF's rule for the global batch.
RunIdentity fresh_identity(const RunOptions& options, int num_ranks);

// Stored values win: they replace those of `options` that the user did not set. One set to something else is Error{config}
// naming it, both values and what to do.
void adopt_identity(const RunIdentity& stored, RunOptions& options);

// The model, the labels and the training data must be those of the run; Error{data} otherwise. So must the optimizer;
// Error{config} otherwise.
void check_same_run(const RunIdentity& stored, const RunIdentity& now);

// Environment in which bits are promised. reduction: see describe_reduction.
nlohmann::json describe_environment(const RunOptions& options, const std::string& reduction);
// What differs as text, "threads_per_rank: 1 before, 2 now". The kernels' instructions count in bf16 only, see
// instruction_set().
struct EnvironmentWords {
  std::string first = "before", second = "now";
};
std::vector<std::string> environment_differences(const nlohmann::json& first, const nlohmann::json& second,
                                                 const EnvironmentWords& words = {});
// Collective. One warning where ranks compute in different environments.
void warn_of_different_environments(const nlohmann::json& own, Communicator& world);

struct RunState {
  RunIdentity identity;
  std::int64_t step = 0;                     // steps done, skipped ones included
  std::int64_t skipped_steps = 0;            // fp16: gradients overflowed; neither optimizer nor schedule moved
  LossScaler scaler;
  DataCursor cursor;                         // next step to load
  std::int64_t tokens_seen = 0, samples_seen = 0;
  double loss_sum = 0;                       // over all steps, for HF's train_loss
  double best_metric = std::numeric_limits<double>::quiet_NaN();
  std::int64_t best_step = -1;
  nlohmann::json log_history = nlohmann::json::array();
  // Losses since the last logged step: logging must not depend on where a run was interrupted.
  double interval_loss_sum = 0;
  std::int64_t interval_steps = 0;

  nlohmann::json to_json() const;
  static RunState from_json(const nlohmann::json& json, const std::string& origin);
};

}  // namespace shardtune
