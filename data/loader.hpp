#pragma once
// From a data set to the micro-batches of each optimizer step. Order depends on (seed, epoch) alone; the cut into
// micro-batches depends on the examples of the step alone; so nothing here knows how many ranks there are.
#include <cstdint>
#include <memory>
#include <vector>

#include "core/batch.hpp"
#include "data/dataset.hpp"

namespace shardtune {

// Order of an epoch: a permutation of [0, size) by Fisher-Yates over Philox keyed by (seed, epoch), or 0..size-1.
enum class SamplingStrategy { random, sequential };
std::vector<std::int64_t> epoch_order(std::int64_t size, std::uint64_t seed, std::int64_t epoch,
                                      SamplingStrategy strategy);

// The one packing collator: examples become segments of one flat row, in the given order. Labels: none in all examples
// (labels stay undefined), one in each (per segment), or as many as tokens in each (per token). An example has at least
// one token; type_ids are needed only with want_token_types.
Batch pack(const std::vector<Example>& examples, const std::vector<std::int64_t>& example_index, bool want_token_types);

struct LoaderOptions {
  std::int64_t global_batch_size = 8;     // examples per optimizer step (G)
  std::int64_t micro_batch_size = 8;      // most examples in a micro-batch (per_device_train_batch_size)
  std::int64_t max_tokens_per_batch = 0;  // most tokens in a micro-batch, 0 = no limit; one longer example stands alone
  bool drop_last = false;                 // drop the last incomplete step of an epoch
  SamplingStrategy strategy = SamplingStrategy::random;
  std::uint64_t seed = 42;
  bool want_token_types = false;
  int steps_ahead = 2;  // at most so many finished steps wait (one more is in the making)
};

// Where the loader stands: everything that has to be saved. After the last step of an epoch: {epoch + 1, 0}.
struct DataCursor {
  std::int64_t epoch = 0;
  std::int64_t step_in_epoch = 0;  // next step to deliver
};

struct StepBatches {
  std::vector<Batch> micro_batches;  // V >= 1, canonical order: index = position in the reduction tree
  std::int64_t num_examples = 0;
  std::int64_t num_tokens = 0;
  std::int64_t num_labelled = 0;  // examples or tokens with a label: the loss denominator
  DataCursor next;                // cursor after this step
};

// The n examples of a step (n = G, fewer in the last step of an epoch) are cut into V = ceil(n / micro_batch_size)
// micro-batches balanced by length: longest first (ties: data order), each to the micro-batch with the fewest tokens
// that still has room (ties: lowest index); examples keep their data order inside a micro-batch. With V = 1 the step is
// one micro-batch in data order. max_tokens_per_batch then cuts each micro-batch, in data order, where the next example
// would pass the limit.
StepBatches make_step(const std::vector<Example>& examples, const std::vector<std::int64_t>& example_index,
                      const LoaderOptions& options);

// Delivers steps without end (epoch after epoch), tokenizing ahead on one thread. Not thread-safe. An error in the
// thread is rethrown by next(), at its place in the order of steps and at every call after it. The data set must
// outlive the loader. Error{config}: an option out of range, or drop_last leaves no step at all. Error{data}: `start`
// lies outside the data set.
class StepLoader {
 public:
  StepLoader(const Dataset& dataset, const LoaderOptions& options, DataCursor start);
  ~StepLoader();  // stops the thread after the example it is at
  StepBatches next();
  std::int64_t steps_per_epoch() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

std::int64_t steps_per_epoch(std::int64_t dataset_size, const LoaderOptions& options);

}  // namespace shardtune
