#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "checkpoint/safetensors.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"
#include "trainer/build.hpp"
#include "trainer/commands.hpp"
#include "trainer/weights.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

// Lines to a file or standard output; used on rank 0 only.
class LineSink {
 public:
  explicit LineSink(const std::string& output) : output_(output), is_file_(!output.empty() && output != "-") {
    if (!is_file_) return;
    file_.open(output, std::ios::binary | std::ios::trunc);
    if (!file_) fail(ErrorKind::io, fmt::format("--output = {}: cannot be created", output));
  }
  void write(const std::string& text) {
    std::ostream& stream = is_file_ ? static_cast<std::ostream&>(file_) : std::cout;
    stream << text;
    if (!stream) fail(ErrorKind::io, fmt::format("--output = {}: cannot be written", output_));
  }
  void close() {
    if (is_file_) file_.close();
    else std::cout.flush();
    if (is_file_ ? !file_ : !std::cout) fail(ErrorKind::io, fmt::format("--output = {}: cannot be written", output_));
  }

 private:
  std::string output_;
  bool is_file_;
  std::ofstream file_;
};

InferenceSetup make_setup(const RunOptions& options, LoadedModel& loaded, Communicator& world, bool want_logits) {
  return {.model = *loaded.model,
          .engine = *loaded.engine,
          .world = world,
          .batch_size = options.train.per_device_eval_batch_size,
          .want_logits = want_logits,
          .label_smoothing = options.train.label_smoothing_factor};
}

// What a command makes of the input's rows.
enum class InputRows {
  labelled,        // evaluate: every row has a label; long texts of causal-lm are cut
  unlabelled,      // predict: labels are not read
  maybe_labelled,  // score: labels are used where all rows have one; example i is row i
};

std::unique_ptr<Dataset> open_input(const RunOptions& options, const LoadedModel& loaded, const std::string& file, InputRows rows) {
  DatasetOptions data = dataset_options(options, file, loaded.max_length);
  data.require_labels = rows == InputRows::labelled;
  data.one_example_per_row = rows == InputRows::maybe_labelled;
  if (rows == InputRows::unlabelled) data.label_column.clear();
  data.max_rows = options.data.max_eval_samples;
  data.num_token_ids = loaded.model->num_token_ids();
  return build_dataset(data, options.model.task, loaded.labels, *loaded.tokenizer);
}

// Opens the sink on rank 0; its failure is every rank's.
std::unique_ptr<LineSink> open_sink(const std::string& output, Communicator& world) {
  std::unique_ptr<LineSink> sink;
  std::string problem;
  if (world.rank() == 0) {
    try {
      sink = std::make_unique<LineSink>(output);
    } catch (const Error& e) {
      problem = e.what();
    }
  }
  problem = broadcast_string(world, problem, 0);
  if (!problem.empty()) fail(ErrorKind::io, problem);
  return sink;
}

std::string required_input(const InferenceOptions& inference) {
  if (inference.input.empty()) fail(ErrorKind::config, "--input is missing: the file of rows to read");
  check_output_is_other(inference.output, inference.input);
  return inference.input;
}

nlohmann::json number_list(const at::Tensor& values) {
  const at::Tensor row = values.to(at::kFloat).contiguous();
  nlohmann::json list = nlohmann::json::array();
  for (std::int64_t i = 0; i < row.numel(); ++i) list.push_back(row.data_ptr<float>()[i]);
  return list;
}

// {"index","label","score","scores"} per row.
std::string predict_lines(const Batch& batch, const ModelOutput& output, const std::vector<std::string>& labels) {
  const at::Tensor probabilities = output.logits.softmax(-1);
  std::string lines;
  for (std::int64_t s = 0; s < batch.num_segments(); ++s) {
    const at::Tensor row = probabilities[s];
    const auto best = row.argmax().item<std::int64_t>();
    nlohmann::ordered_json scores;
    for (std::int64_t c = 0; c < row.numel(); ++c) scores[labels[static_cast<std::size_t>(c)]] = row[c].item<float>();
    lines += format_json_line({{"index", batch.example_index[static_cast<std::size_t>(s)]},
                               {"label", labels[static_cast<std::size_t>(best)]},
                               {"score", row[best].item<float>()},
                               {"scores", scores}}) + "\n";
  }
  return lines;
}

// One score row; `logits` are the segment's: [C] or [n, V].
nlohmann::json score_row(const Batch& batch, std::int64_t segment, const at::Tensor& logits, bool is_causal) {
  const auto s = static_cast<std::size_t>(segment);
  const std::int64_t begin = batch.segment_offsets[s], end = batch.segment_offsets[s + 1];
  nlohmann::json row{{"index", batch.example_index[s]}};
  nlohmann::json ids = nlohmann::json::array();
  for (std::int64_t t = begin; t < end; ++t) ids.push_back(batch.ids[t].item<std::int64_t>());
  row["input_ids"] = std::move(ids);
  if (is_causal) {
    const std::int64_t n = end - begin;
    const at::Tensor targets = batch.ids.narrow(0, begin + 1, n - 1);
    const at::Tensor chosen = logits.narrow(0, 0, n - 1).to(at::kDouble).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1);
    row["token_logprobs"] = number_list(chosen);
    row["loss"] = n > 1 ? -chosen.mean().item<double>() : 0.0;
    return row;
  }
  row["logits"] = number_list(logits);
  if (batch.labels.defined()) {
    const auto label = batch.labels[segment].item<std::int64_t>();
    row["loss"] = -logits.to(at::kDouble).log_softmax(-1)[label].item<double>();
  }
  return row;
}

// Gradient of the mean loss over the whole file, without dropout, through the same engine as training.
void save_gradients(const RunOptions& options, LoadedModel& loaded, const Dataset& dataset, Communicator& world, const fs::path& file) {
  std::vector<Example> examples;
  std::vector<std::int64_t> index;
  for (std::int64_t i = 0; i < dataset.size(); ++i) {
    examples.push_back(dataset.get(i));
    index.push_back(i);
  }
  const StepBatches step = make_step(examples, index,
                                     {.global_batch_size = dataset.size(),
                                      .micro_batch_size = options.train.per_device_eval_batch_size,
                                      .want_token_types = loaded.model->uses_token_types()});
  if (step.num_labelled == 0) fail(ErrorKind::data, "--save_gradients needs labelled rows: without labels there is no loss");
  ParallelEngine& engine = *loaded.engine;
  const auto count = static_cast<std::int64_t>(step.micro_batches.size());
  engine.begin_step(count);
  for (std::int64_t round = 0; round < engine.num_rounds(count); ++round) {
    const std::int64_t mine = engine.micro_batch_of_round(count, round);
    if (mine < 0 && !engine.runs_every_round()) continue;
    engine.begin_micro_batch(round);
    const ModelOutput output =
        loaded.model->forward(step.micro_batches[static_cast<std::size_t>(std::max<std::int64_t>(0, mine))], engine.runner(), {},
                              {.loss_scale = 1.0 / static_cast<double>(step.num_labelled)});
    engine.backward(output.loss_sum);
  }
  engine.finish_step();
  export_tensors(world, engine, file, [](const ShardedParameter& p) { return p.gradient; });
}

}  // namespace

int run_evaluate(const RunOptions& options, const InferenceOptions& inference, Communicator& world) {
  check_same_options(options, world);
  LoadedModel loaded = load_for_inference(options, world);
  std::string file = inference.input;
  if (file.empty()) file = options.data.test_file.empty() ? options.data.validation_file : options.data.test_file;
  if (file.empty()) fail(ErrorKind::config, "nothing to evaluate: give --input, --test_file or --validation_file");
  check_output_is_other(inference.output, file);
  const auto dataset = open_input(options, loaded, file, InputRows::labelled);
  const auto sink = open_sink(inference.output, world);
  const nlohmann::json metrics = evaluate(make_setup(options, loaded, world, false), *dataset);
  if (sink) {
    sink->write(format_json_line(metrics) + "\n");
    sink->close();
  }
  return 0;
}

int run_predict(const RunOptions& options, const InferenceOptions& inference, Communicator& world) {
  check_same_options(options, world);
  if (options.model.task != "text-classification")
    fail(ErrorKind::config, fmt::format("predict supports --task text-classification, not {}; use score for causal-lm", options.model.task));
  LoadedModel loaded = load_for_inference(options, world);
  const auto dataset = open_input(options, loaded, required_input(inference), InputRows::unlabelled);
  const auto sink = open_sink(inference.output, world);
  run_inference(make_setup(options, loaded, world, false), *dataset,
                [&](const Batch& batch, const ModelOutput& output) { return predict_lines(batch, output, loaded.labels); },
                [&](const std::string& lines) { sink->write(lines); });
  if (sink) sink->close();
  return 0;
}

int run_score(const RunOptions& options, const InferenceOptions& inference, Communicator& world) {
  check_same_options(options, world);
  if (!inference.full_logits.empty() && world.size() > 1)
    fail(ErrorKind::config, "--full_logits works on one rank; start without mpirun or with -n 1");
  LoadedModel loaded = load_for_inference(options, world);
  const auto dataset = open_input(options, loaded, required_input(inference), InputRows::maybe_labelled);
  const auto sink = open_sink(inference.output, world);
  const bool is_causal = options.model.task == "causal-lm";
  std::vector<std::pair<SafetensorsWriter::Item, at::Tensor>> full;
  const auto handle = [&](const Batch& batch, const ModelOutput& output) {
    std::string lines;
    for (std::int64_t s = 0; s < batch.num_segments(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      const std::int64_t begin = batch.segment_offsets[i], length = batch.segment_offsets[i + 1] - begin;
      const at::Tensor logits = is_causal ? output.logits.narrow(0, begin, length) : output.logits[s];
      lines += format_json_line(score_row(batch, s, logits, is_causal)) + "\n";
      if (!inference.full_logits.empty())
        full.push_back({{fmt::format("logits.{}", batch.example_index[i]), "F32", logits.sizes().vec()}, logits.to(at::kFloat).flatten().clone()});
    }
    return lines;
  };
  run_inference(make_setup(options, loaded, world, true), *dataset, handle, [&](const std::string& lines) { sink->write(lines); });
  if (sink) sink->close();
  if (!inference.full_logits.empty()) {
    std::vector<SafetensorsWriter::Item> items;
    for (const auto& [item, values] : full) items.push_back(item);
    SafetensorsWriter writer(inference.full_logits, items);
    for (const auto& [item, values] : full) writer.write(values);
    writer.commit();
  }
  if (!inference.save_gradients.empty()) save_gradients(options, loaded, *dataset, world, inference.save_gradients);
  return 0;
}

}  // namespace shardtune
