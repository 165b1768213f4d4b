#include "trainer/evaluator.hpp"

#include <chrono>
#include <cmath>
#include <cstring>

#include <ATen/ATen.h>

#include "core/error.hpp"
#include "core/huge_pages.hpp"
#include "data/loader.hpp"
#include "distributed/comm/exchange.hpp"
#include "trainer/metrics.hpp"

namespace shardtune {
namespace {

Batch read_batch(const InferenceSetup& setup, const Dataset& dataset, std::int64_t batch_index) {
  const std::int64_t begin = batch_index * setup.batch_size;
  const std::int64_t end = std::min(dataset.size(), begin + setup.batch_size);
  std::vector<Example> examples;
  std::vector<std::int64_t> index;
  for (std::int64_t i = begin; i < end; ++i) {
    examples.push_back(dataset.get(i));
    index.push_back(i);
  }
  return pack(examples, index, setup.model.uses_token_types());
}

// What a batch contributes to the metrics, as bytes: fixed layout so that it travels as a string.
struct RowOutcome {
  std::int64_t predicted = -1, expected = -1;  // classification
};
struct BatchOutcome {
  double loss_sum = 0;
  std::int64_t num_labelled = 0, num_rows = 0;
};

std::string outcome_bytes(const Batch& batch, const ModelOutput& output) {
  BatchOutcome outcome;
  std::vector<RowOutcome> rows;
  outcome.loss_sum = output.loss_sum.item<double>();
  if (output.logits.defined() && batch.labels.size(0) == output.logits.size(0)) {
    const at::Tensor predicted = output.logits.argmax(-1).contiguous(), expected = batch.labels.contiguous();
    for (std::int64_t i = 0; i < predicted.numel(); ++i)
      rows.push_back({predicted.data_ptr<std::int64_t>()[i], expected.data_ptr<std::int64_t>()[i]});
  }
  outcome.num_labelled = (batch.labels != -100).sum().item<std::int64_t>();
  outcome.num_rows = static_cast<std::int64_t>(rows.size());
  std::string bytes(reinterpret_cast<const char*>(&outcome), sizeof outcome);
  if (!rows.empty()) bytes.append(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(RowOutcome));
  return bytes;
}

// All batches' outcomes in input order.
struct Totals {
  double loss_sum = 0;
  std::int64_t num_labelled = 0;
  std::vector<std::int64_t> predicted, expected;

  void add(const std::string& bytes) {
    BatchOutcome outcome;
    std::memcpy(&outcome, bytes.data(), sizeof outcome);
    loss_sum += outcome.loss_sum;
    num_labelled += outcome.num_labelled;
    for (std::int64_t i = 0; i < outcome.num_rows; ++i) {
      RowOutcome row;
      std::memcpy(&row, bytes.data() + sizeof outcome + static_cast<std::size_t>(i) * sizeof row, sizeof row);
      predicted.push_back(row.predicted);
      expected.push_back(row.expected);
    }
  }
};

}  // namespace

void run_inference(const InferenceSetup& setup, const Dataset& dataset, const BatchHandler& handle, const TextWriter& write) {
  const std::int64_t num_batches = (dataset.size() + setup.batch_size - 1) / setup.batch_size;
  const int num_ranks = setup.world.size(), rank = setup.world.rank();
  const EvaluationScope scope(setup.engine);
  for (std::int64_t first = 0; first < num_batches; first += num_ranks) {
    if (first > 0) adopt_huge_pages();  // for more than one round; nothing to do after a step of training
    const std::int64_t mine = first + rank;
    const bool is_real = mine < num_batches;
    std::string text;
    // A rank without a batch runs the round's first one again: its collectives are needed by the others.
    if (is_real || setup.engine.runs_every_round()) {
      const Batch batch = read_batch(setup, dataset, is_real ? mine : first);
      const ModelOutput output =
          setup.model.forward(batch, setup.engine.runner(), {},
                              {.want_logits = setup.want_logits, .label_smoothing = setup.label_smoothing});
      if (is_real) text = handle(batch, output);
    }
    const std::vector<std::string> texts = all_gather_strings(setup.world, text);
    if (rank == 0)
      for (std::int64_t i = 0; i < num_ranks && first + i < num_batches; ++i) write(texts[static_cast<std::size_t>(i)]);
  }
}

nlohmann::json evaluate(const InferenceSetup& setup, const Dataset& dataset) {
  const auto start = std::chrono::steady_clock::now();
  Totals totals;
  run_inference(setup, dataset, outcome_bytes, [&](const std::string& bytes) { totals.add(bytes); });
  nlohmann::json metrics;
  if (setup.world.rank() == 0) {
    const double loss = totals.loss_sum / static_cast<double>(std::max<std::int64_t>(1, totals.num_labelled));
    metrics["eval_loss"] = loss;
    metrics["eval_samples"] = dataset.size();
    if (totals.predicted.empty()) {
      metrics["eval_perplexity"] = std::exp(loss);
    } else {
      metrics["eval_accuracy"] = accuracy(totals.predicted, totals.expected);
      metrics["eval_f1"] = macro_f1(totals.predicted, totals.expected);
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    metrics["eval_runtime"] = seconds;
    metrics["eval_samples_per_second"] = static_cast<double>(dataset.size()) / seconds;
  }
  // Rank 0 computed it from bytes that do not depend on the number of ranks; the others take its very numbers.
  const std::vector<std::uint8_t> packed = setup.world.rank() == 0 ? nlohmann::json::to_cbor(metrics) : std::vector<std::uint8_t>{};
  const std::string shared = broadcast_string(setup.world, std::string(packed.begin(), packed.end()), 0);
  return nlohmann::json::from_cbor(shared);
}

}  // namespace shardtune
