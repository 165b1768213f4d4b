#include "data/loader.hpp"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include "core/error.hpp"
#include "core/rng.hpp"

namespace shardtune {
namespace {

// Keeps the stream of the shuffle apart from those of dropout and initialisation under the same seed.
constexpr std::uint64_t kShuffleSite = 0x73687566666c65ULL;
constexpr std::int64_t kNotCounted = -100;

void validate(const LoaderOptions& options) {
  const auto at_least = [](const char* name, std::int64_t value, std::int64_t least) {
    if (value < least) fail(ErrorKind::config, fmt::format("{} must be at least {} (got {})", name, least, value));
  };
  at_least("global_batch_size", options.global_batch_size, 1);
  at_least("per_device_train_batch_size", options.micro_batch_size, 1);
  at_least("max_tokens_per_batch", options.max_tokens_per_batch, 0);
  at_least("steps_ahead", options.steps_ahead, 1);
}

std::int64_t length_of(const Example& example) { return static_cast<std::int64_t>(example.ids.size()); }

at::Tensor empty_row(std::int64_t size) { return at::empty({size}, at::TensorOptions(at::kLong)); }

// Positions in `examples` of each micro-batch, by the rule of make_step in the header.
using Cut = std::vector<std::vector<std::size_t>>;

Cut balance(const std::vector<Example>& examples, std::int64_t micro_batch_size) {
  const auto room = static_cast<std::size_t>(micro_batch_size);
  Cut cut((examples.size() + room - 1) / room);
  std::vector<std::int64_t> tokens(cut.size(), 0);
  std::vector<std::size_t> by_length(examples.size());
  std::iota(by_length.begin(), by_length.end(), std::size_t{0});
  std::stable_sort(by_length.begin(), by_length.end(),
                   [&](std::size_t a, std::size_t b) { return length_of(examples[a]) > length_of(examples[b]); });
  for (const std::size_t position : by_length) {
    std::size_t best = cut.size();
    for (std::size_t i = 0; i < cut.size(); ++i)
      if (cut[i].size() < room && (best == cut.size() || tokens[i] < tokens[best])) best = i;
    cut[best].push_back(position);
    tokens[best] += length_of(examples[position]);
  }
  for (auto& micro_batch : cut) std::sort(micro_batch.begin(), micro_batch.end());
  return cut;
}

Cut cut_by_tokens(const Cut& coarse, const std::vector<Example>& examples, std::int64_t max_tokens) {
  Cut fine;
  for (const auto& micro_batch : coarse) {
    std::int64_t tokens = 0;
    fine.emplace_back();
    for (const std::size_t position : micro_batch) {
      const std::int64_t length = length_of(examples[position]);
      if (!fine.back().empty() && tokens + length > max_tokens) {
        fine.emplace_back();
        tokens = 0;
      }
      fine.back().push_back(position);
      tokens += length;
    }
  }
  return fine;
}

std::int64_t count_labelled(const Example& example) {
  return static_cast<std::int64_t>(example.labels.size()) -
         std::count(example.labels.begin(), example.labels.end(), kNotCounted);
}

enum class LabelKind { none, per_segment, per_token };

LabelKind label_kind(const std::vector<Example>& examples) {
  const auto all = [&](auto size_of) {
    return std::all_of(examples.begin(), examples.end(),
                       [&](const Example& e) { return e.labels.size() == size_of(e); });
  };
  if (all([](const Example&) { return std::size_t{0}; })) return LabelKind::none;
  if (all([](const Example&) { return std::size_t{1}; })) return LabelKind::per_segment;
  check_internal(all([](const Example& e) { return e.ids.size(); }),
                 "the examples of a batch must all have no labels, one label, or one label a token");
  return LabelKind::per_token;
}

}  // namespace

std::vector<std::int64_t> epoch_order(std::int64_t size, std::uint64_t seed, std::int64_t epoch,
                                      SamplingStrategy strategy) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(size));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  if (strategy == SamplingStrategy::sequential) return order;
  PhiloxStream stream(mix_key(seed, kShuffleSite, static_cast<std::uint64_t>(epoch)));
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[stream.next_below(i)]);
  return order;
}

Batch pack(const std::vector<Example>& examples, const std::vector<std::int64_t>& example_index,
           bool want_token_types) {
  check_internal(!examples.empty() && examples.size() == example_index.size(),
                 "pack: no examples, or not one index each");
  Batch batch;
  batch.example_index = example_index;
  batch.segment_offsets.push_back(0);
  for (const Example& example : examples) {
    check_internal(!example.ids.empty(), "pack: an example without tokens");
    check_internal(!want_token_types || example.type_ids.size() == example.ids.size(), "pack: not one type id a token");
    batch.segment_offsets.push_back(batch.segment_offsets.back() + length_of(example));
  }
  const std::int64_t num_tokens = batch.num_tokens();
  const LabelKind labels = label_kind(examples);
  batch.ids = empty_row(num_tokens);
  batch.positions = empty_row(num_tokens);
  if (want_token_types) batch.token_types = empty_row(num_tokens);
  if (labels != LabelKind::none)
    batch.labels = empty_row(labels == LabelKind::per_token ? num_tokens : batch.num_segments());
  auto* ids = batch.ids.mutable_data_ptr<std::int64_t>();
  auto* positions = batch.positions.mutable_data_ptr<std::int64_t>();
  auto* types = want_token_types ? batch.token_types.mutable_data_ptr<std::int64_t>() : nullptr;
  auto* label = labels != LabelKind::none ? batch.labels.mutable_data_ptr<std::int64_t>() : nullptr;
  for (const Example& example : examples) {
    ids = std::copy(example.ids.begin(), example.ids.end(), ids);
    std::iota(positions, positions + length_of(example), std::int64_t{0});
    positions += length_of(example);
    if (types != nullptr) types = std::copy(example.type_ids.begin(), example.type_ids.end(), types);
    if (label != nullptr) label = std::copy(example.labels.begin(), example.labels.end(), label);
  }
  return batch;
}

StepBatches make_step(const std::vector<Example>& examples, const std::vector<std::int64_t>& example_index,
                      const LoaderOptions& options) {
  validate(options);
  check_internal(!examples.empty() && examples.size() == example_index.size(),
                 "make_step: no examples, or not one index each");
  Cut cut = balance(examples, options.micro_batch_size);
  if (options.max_tokens_per_batch > 0) cut = cut_by_tokens(cut, examples, options.max_tokens_per_batch);
  StepBatches step;
  for (const auto& positions : cut) {
    std::vector<Example> members;
    std::vector<std::int64_t> index;
    for (const std::size_t position : positions) {
      members.push_back(examples[position]);
      index.push_back(example_index[position]);
    }
    step.micro_batches.push_back(pack(members, index, options.want_token_types));
    step.num_tokens += step.micro_batches.back().num_tokens();
  }
  step.num_examples = static_cast<std::int64_t>(examples.size());
  for (const Example& example : examples) step.num_labelled += count_labelled(example);
  return step;
}

std::int64_t steps_per_epoch(std::int64_t dataset_size, const LoaderOptions& options) {
  validate(options);
  const std::int64_t whole = dataset_size / options.global_batch_size;
  return whole + (!options.drop_last && dataset_size % options.global_batch_size != 0 ? 1 : 0);
}

struct StepLoader::Impl {
  Impl(const Dataset& dataset_in, const LoaderOptions& options_in, DataCursor start)
      : dataset(dataset_in), options(options_in), num_steps(shardtune::steps_per_epoch(dataset.size(), options)) {
    if (num_steps == 0)
      fail(ErrorKind::config,
           fmt::format("the data set has {} examples, fewer than one step of {}; lower global_batch_size or set "
                       "dataloader_drop_last = false",
                       dataset.size(), options.global_batch_size));
    if (start.epoch < 0 || start.step_in_epoch < 0 || start.step_in_epoch > num_steps)
      fail(ErrorKind::data,
           fmt::format("the saved position (epoch {}, step {}) does not exist in a data set of {} steps an "
                       "epoch; were the data or the batch size changed?",
                       start.epoch, start.step_in_epoch, num_steps));
    producer_at = start;
    wrap(producer_at);
    thread = std::thread([this] { produce(); });
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex);
      is_stopping = true;
    }
    changed.notify_all();
    thread.join();
  }

  void wrap(DataCursor& cursor) const {
    if (cursor.step_in_epoch == num_steps) cursor = {cursor.epoch + 1, 0};
  }

  bool must_stop() {
    const std::lock_guard lock(mutex);
    return is_stopping;
  }

  // Nothing when the loader is being destroyed.
  std::optional<StepBatches> make_next() {
    if (order_epoch != producer_at.epoch) {
      order = epoch_order(dataset.size(), options.seed, producer_at.epoch, options.strategy);
      order_epoch = producer_at.epoch;
    }
    const std::int64_t begin = producer_at.step_in_epoch * options.global_batch_size;
    const std::int64_t end = std::min(begin + options.global_batch_size, dataset.size());
    const std::vector<std::int64_t> rows(order.begin() + begin, order.begin() + end);
    std::vector<Example> examples;
    for (const std::int64_t row : rows) {
      if (must_stop()) return std::nullopt;
      examples.push_back(dataset.get(row));
    }
    StepBatches step = make_step(examples, rows, options);
    ++producer_at.step_in_epoch;
    wrap(producer_at);
    step.next = producer_at;
    return step;
  }

  void produce() {
    try {
      for (;;) {
        std::optional<StepBatches> step = make_next();
        if (!step) return;
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return is_stopping || ready.size() < static_cast<std::size_t>(options.steps_ahead); });
        if (is_stopping) return;
        ready.push_back(std::move(*step));
        changed.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
      changed.notify_all();
    }
  }

  const Dataset& dataset;
  const LoaderOptions options;
  const std::int64_t num_steps;

  // The producer's own.
  DataCursor producer_at;
  std::vector<std::int64_t> order;
  std::int64_t order_epoch = -1;

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::deque<StepBatches> ready;
  std::exception_ptr error;
  bool is_stopping = false;

  std::thread thread;  // last: starts when all else is built
};

StepLoader::StepLoader(const Dataset& dataset, const LoaderOptions& options, DataCursor start)
    : impl_(std::make_unique<Impl>(dataset, options, start)) {}

StepLoader::~StepLoader() = default;

StepBatches StepLoader::next() {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [&] { return !impl_->ready.empty() || impl_->error != nullptr; });
  if (impl_->ready.empty()) std::rethrow_exception(impl_->error);
  StepBatches step = std::move(impl_->ready.front());
  impl_->ready.pop_front();
  impl_->changed.notify_all();
  return step;
}

std::int64_t StepLoader::steps_per_epoch() const { return impl_->num_steps; }

}  // namespace shardtune
