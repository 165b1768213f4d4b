#pragma once
// Forward passes over a data set, spread over the ranks: evaluation metrics and per-batch results in input order.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/batch.hpp"
#include "data/dataset.hpp"
#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/parallel_engine.hpp"
#include "models/model.hpp"

namespace shardtune {

struct InferenceSetup {
  Model& model;
  ParallelEngine& engine;
  Communicator& world;
  std::int64_t batch_size = 8;   // examples per forward pass
  bool want_logits = false;      // causal LM: also return [T, V] logits
  double label_smoothing = 0.0;  // of the loss
};

// Collective. Batches are consecutive rows; rank r of N computes batches r, r + N, ... On every rank `handle` is called
// for its own batches only, in order, and returns a text; on rank 0 `write` then receives the texts of all batches in
// input order (texts travel once per round of N batches).
using BatchHandler = std::function<std::string(const Batch&, const ModelOutput&)>;
using TextWriter = std::function<void(const std::string&)>;
void run_inference(const InferenceSetup& setup, const Dataset& dataset, const BatchHandler& handle, const TextWriter& write);

// Collective; the same object on every rank and at any number of ranks. Keys with HF names, without step and epoch:
// eval_loss, eval_samples, eval_runtime, eval_samples_per_second, and eval_accuracy, eval_f1 (macro) for classification
// or eval_perplexity for causal LM. eval_loss is the mean over all labelled examples or tokens,
// with the setup's label smoothing.
nlohmann::json evaluate(const InferenceSetup& setup, const Dataset& dataset);

}  // namespace shardtune
