#include "data/loader.hpp"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <set>
#include <string>
#include <thread>

#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/rng.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune {
namespace {

using testing_support::error_of;

std::vector<std::int64_t> values_of(const at::Tensor& tensor) {
  const auto* data = tensor.const_data_ptr<std::int64_t>();
  return {data, data + tensor.numel()};
}

// Row i has 1 + (37 i mod 53) tokens i, i + 1, ...; get() may yield at random and may throw at one row.
class FakeDataset final : public Dataset {
 public:
  explicit FakeDataset(std::int64_t size, std::int64_t bad_row = -1, bool is_jumpy = false)
      : size_(size), bad_row_(bad_row), is_jumpy_(is_jumpy) {}
  std::int64_t size() const override { return size_; }
  Example get(std::int64_t index) const override {
    const std::int64_t call = num_calls_++;
    if (index == bad_row_) fail(ErrorKind::data, "bad row " + std::to_string(index));
    if (is_jumpy_) {
      PhiloxStream random(static_cast<std::uint64_t>(call));
      for (auto n = random.next_below(200); n > 0; --n) std::this_thread::yield();
    }
    Example example;
    example.ids.resize(static_cast<std::size_t>(1 + 37 * index % 53));
    std::iota(example.ids.begin(), example.ids.end(), static_cast<std::int32_t>(index));
    example.type_ids.assign(example.ids.size(), 0);
    example.labels = {index % 3};
    return example;
  }
  std::int64_t num_calls() const { return num_calls_; }

 private:
  std::int64_t size_, bad_row_;
  bool is_jumpy_;
  mutable std::atomic<std::int64_t> num_calls_{0};
};

std::vector<Example> examples_of_lengths(const std::vector<std::size_t>& lengths) {
  std::vector<Example> examples;
  for (const std::size_t length : lengths) {
    Example example;
    example.ids.assign(length, 7);
    example.type_ids.assign(length, 0);
    example.labels = {0};
    examples.push_back(example);
  }
  return examples;
}

std::vector<std::int64_t> counting(std::size_t size) {
  std::vector<std::int64_t> result(size);
  std::iota(result.begin(), result.end(), std::int64_t{0});
  return result;
}

using Groups = std::vector<std::vector<std::int64_t>>;

Groups groups_of(const StepBatches& step) {
  Groups groups;
  for (const Batch& batch : step.micro_batches) groups.push_back(batch.example_index);
  return groups;
}

Groups cut(const std::vector<std::size_t>& lengths, std::int64_t micro, std::int64_t max_tokens = 0) {
  LoaderOptions options;
  options.global_batch_size = static_cast<std::int64_t>(lengths.size());
  options.micro_batch_size = micro;
  options.max_tokens_per_batch = max_tokens;
  return groups_of(make_step(examples_of_lengths(lengths), counting(lengths.size()), options));
}

TEST(EpochOrder, IsAPermutationThatDependsOnSeedAndEpochAlone) {
  std::set<std::vector<std::int64_t>> seen;
  for (const std::uint64_t seed : {42U, 43U})
    for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
      auto order = epoch_order(101, seed, epoch, SamplingStrategy::random);
      EXPECT_EQ(order, epoch_order(101, seed, epoch, SamplingStrategy::random));
      seen.insert(order);
      std::sort(order.begin(), order.end());
      EXPECT_EQ(order, counting(101));
    }
  EXPECT_EQ(seen.size(), 6U);
  EXPECT_EQ(epoch_order(5, 1, 9, SamplingStrategy::sequential), counting(5));
  EXPECT_TRUE(epoch_order(0, 1, 0, SamplingStrategy::random).empty());
}

TEST(EpochOrder, EveryRowReachesEveryPlaceEquallyOften) {
  constexpr int kSize = 5, kEpochs = 20000;
  int counts[kSize][kSize] = {};
  for (int epoch = 0; epoch < kEpochs; ++epoch) {
    const auto order = epoch_order(kSize, 7, epoch, SamplingStrategy::random);
    for (int place = 0; place < kSize; ++place) ++counts[order[static_cast<std::size_t>(place)]][place];
  }
  // 4000 expected, standard deviation 57: five of them.
  for (const auto& row : counts)
    for (const int count : row) EXPECT_NEAR(count, kEpochs / kSize, 285);
}

// A run that is resumed after an upgrade must go on in the same order.
TEST(EpochOrder, IsFrozen) {
  EXPECT_EQ(epoch_order(8, 42, 0, SamplingStrategy::random), (std::vector<std::int64_t>{4, 6, 7, 0, 2, 5, 3, 1}));
  EXPECT_EQ(epoch_order(8, 42, 1, SamplingStrategy::random), (std::vector<std::int64_t>{1, 3, 2, 7, 5, 0, 6, 4}));
}

TEST(Pack, MakesOneFlatRowOfSegmentsWithoutPadding) {
  Example a{{11, 12, 13}, {0, 0, 1}, {4}}, b{{21}, {0}, {5}};
  const Batch batch = pack({a, b}, {9, 2}, true);
  EXPECT_EQ(values_of(batch.ids), (std::vector<std::int64_t>{11, 12, 13, 21}));
  EXPECT_EQ(values_of(batch.positions), (std::vector<std::int64_t>{0, 1, 2, 0}));
  EXPECT_EQ(values_of(batch.token_types), (std::vector<std::int64_t>{0, 0, 1, 0}));
  EXPECT_EQ(batch.segment_offsets, (std::vector<std::int64_t>{0, 3, 4}));
  EXPECT_EQ(values_of(batch.labels), (std::vector<std::int64_t>{4, 5}));
  EXPECT_EQ(batch.example_index, (std::vector<std::int64_t>{9, 2}));
  EXPECT_FALSE(pack({a, b}, {9, 2}, false).token_types.defined());
}

TEST(Pack, KeepsTokenLabelsAndLeavesMissingLabelsUndefined) {
  Example a{{11, 12, 13}, {}, {12, 13, -100}}, b{{21, 22}, {}, {22, -100}};
  EXPECT_EQ(values_of(pack({a, b}, {0, 1}, false).labels), (std::vector<std::int64_t>{12, 13, -100, 22, -100}));
  a.labels.clear();
  b.labels.clear();
  EXPECT_FALSE(pack({a, b}, {0, 1}, false).labels.defined());
  b.labels = {1};
  EXPECT_THROW(pack({a, b}, {0, 1}, false), Error);
  EXPECT_THROW(pack({a}, {0}, true), Error);
  EXPECT_THROW(pack({}, {}, false), Error);
  EXPECT_THROW(pack({Example{}}, {0}, false), Error);
}

TEST(MakeStep, BalancesByLengthAsTheContractSays) {
  // 9 to the first, 8 to the second, 7 and 3 to the third (now full), the earlier 2 to the second (8 < 9), the last 2
  // to the first.
  EXPECT_EQ(cut({2, 9, 3, 8, 2, 7}, 2), (Groups{{1, 4}, {0, 3}, {2, 5}}));
  EXPECT_EQ(cut({5, 5, 5, 5, 5}, 2), (Groups{{0, 3}, {1, 4}, {2}}));
  EXPECT_EQ(cut({1, 9, 4}, 3), (Groups{{0, 1, 2}}));
  EXPECT_EQ(cut({1, 9, 4}, 8), (Groups{{0, 1, 2}}));
  EXPECT_EQ(cut({1, 9, 4}, 1), (Groups{{1}, {2}, {0}}));
}

TEST(MakeStep, MaxTokensCutsFurtherAndALongerExampleStandsAlone) {
  EXPECT_EQ(cut({4, 4, 4, 20, 1, 2}, 6, 8), (Groups{{0, 1}, {2}, {3}, {4, 5}}));
  EXPECT_EQ(cut({20, 20}, 2, 8), (Groups{{0}, {1}}));
  EXPECT_EQ(cut({3, 5}, 2, 8), (Groups{{0, 1}}));
}

TEST(MakeStep, MicroBatchesAreEvenWithinOneExampleOnRandomLengths) {
  PhiloxStream random(5);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::size_t> lengths(1 + random.next_below(70));
    for (auto& length : lengths) length = 1 + random.next_below(200);
    const auto micro = static_cast<std::int64_t>(1 + random.next_below(9));
    LoaderOptions options;
    options.micro_batch_size = micro;
    const StepBatches step = make_step(examples_of_lengths(lengths), counting(lengths.size()), options);
    const auto total = static_cast<std::int64_t>(std::accumulate(lengths.begin(), lengths.end(), std::size_t{0}));
    const auto num_rows = static_cast<std::int64_t>(lengths.size());
    const auto longest = static_cast<std::int64_t>(*std::max_element(lengths.begin(), lengths.end()));
    EXPECT_EQ(static_cast<std::int64_t>(step.micro_batches.size()), (num_rows + micro - 1) / micro);
    EXPECT_EQ(step.num_tokens, total);
    EXPECT_EQ(step.num_examples, num_rows);
    EXPECT_EQ(step.num_labelled, num_rows);
    std::set<std::int64_t> rows;
    for (const Batch& batch : step.micro_batches) {
      EXPECT_GE(batch.num_segments(), 1);
      EXPECT_LE(batch.num_segments(), micro);
      EXPECT_TRUE(std::is_sorted(batch.example_index.begin(), batch.example_index.end()));
      rows.insert(batch.example_index.begin(), batch.example_index.end());
      if (num_rows % micro == 0) {
        EXPECT_LE(batch.num_tokens(), total / static_cast<std::int64_t>(step.micro_batches.size()) + longest);
      }
    }
    EXPECT_EQ(rows.size(), lengths.size());
  }
}

TEST(MakeStep, CountsLabelledTokensForCausalLm) {
  LoaderOptions options;
  const std::vector<Example> examples{{{1, 2, 3}, {}, {2, 3, -100}}, {{4, 5}, {}, {5, -100}}};
  EXPECT_EQ(make_step(examples, {0, 1}, options).num_labelled, 3);
  const std::vector<Example> unlabelled{{{1, 2, 3}, {}, {}}};
  EXPECT_EQ(make_step(unlabelled, {0}, options).num_labelled, 0);
}

TEST(Steps, CountsTheLastIncompleteStepUnlessDropped) {
  LoaderOptions options;
  options.global_batch_size = 8;
  EXPECT_EQ(steps_per_epoch(16, options), 2);
  EXPECT_EQ(steps_per_epoch(17, options), 3);
  EXPECT_EQ(steps_per_epoch(5, options), 1);
  options.drop_last = true;
  EXPECT_EQ(steps_per_epoch(17, options), 2);
  EXPECT_EQ(steps_per_epoch(5, options), 0);
}

bool same(const StepBatches& a, const StepBatches& b) {
  if (a.micro_batches.size() != b.micro_batches.size() || a.num_tokens != b.num_tokens ||
      a.num_examples != b.num_examples || a.num_labelled != b.num_labelled || a.next.epoch != b.next.epoch ||
      a.next.step_in_epoch != b.next.step_in_epoch)
    return false;
  for (std::size_t i = 0; i < a.micro_batches.size(); ++i) {
    const Batch &x = a.micro_batches[i], &y = b.micro_batches[i];
    if (x.example_index != y.example_index || x.segment_offsets != y.segment_offsets || !at::equal(x.ids, y.ids) ||
        !at::equal(x.positions, y.positions) || !at::equal(x.labels, y.labels))
      return false;
  }
  return true;
}

LoaderOptions small_options() {
  LoaderOptions options;
  options.global_batch_size = 7;
  options.micro_batch_size = 3;
  return options;
}

TEST(StepLoader, DeliversEveryRowOncePerEpochInTheEpochsOrder) {
  const FakeDataset dataset(24);
  StepLoader loader(dataset, small_options(), {});
  ASSERT_EQ(loader.steps_per_epoch(), 4);
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    const auto order = epoch_order(24, 42, epoch, SamplingStrategy::random);
    for (std::int64_t step = 0; step < 4; ++step) {
      const StepBatches got = loader.next();
      EXPECT_EQ(got.num_examples, step == 3 ? 3 : 7);
      EXPECT_EQ(got.micro_batches.size(), step == 3 ? 1U : 3U);
      EXPECT_EQ(got.next.epoch, step == 3 ? epoch + 1 : epoch);
      EXPECT_EQ(got.next.step_in_epoch, step == 3 ? 0 : step + 1);
      std::vector<std::int64_t> rows, expected(order.begin() + 7 * step, order.begin() + 7 * step + got.num_examples);
      for (const Batch& batch : got.micro_batches)
        rows.insert(rows.end(), batch.example_index.begin(), batch.example_index.end());
      std::sort(rows.begin(), rows.end());
      std::sort(expected.begin(), expected.end());
      EXPECT_EQ(rows, expected);
    }
  }
}

TEST(StepLoader, DropLastLeavesOnlyWholeSteps) {
  const FakeDataset dataset(24);
  LoaderOptions options = small_options();
  options.drop_last = true;
  StepLoader loader(dataset, options, {});
  EXPECT_EQ(loader.steps_per_epoch(), 3);
  for (int i = 0; i < 7; ++i) EXPECT_EQ(loader.next().num_examples, 7);
}

TEST(StepLoader, AStepLargerThanTheDataSetTakesAllOfIt) {
  const FakeDataset dataset(5);
  StepLoader loader(dataset, small_options(), {});
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    const StepBatches step = loader.next();
    EXPECT_EQ(step.num_examples, 5);
    EXPECT_EQ(step.next.epoch, epoch + 1);
  }
  LoaderOptions options = small_options();
  options.drop_last = true;
  EXPECT_EQ(error_of(ErrorKind::config, [&] { StepLoader(dataset, options, {}); }),
            "the data set has 5 examples, fewer than one step of 7; lower global_batch_size or set "
            "dataloader_drop_last = false");
}

TEST(StepLoader, ResumingAtAnyCursorContinuesIdentically) {
  const FakeDataset dataset(24);
  std::vector<StepBatches> whole;
  StepLoader loader(dataset, small_options(), {});
  for (int i = 0; i < 12; ++i) whole.push_back(loader.next());
  for (std::size_t stop = 0; stop + 1 < whole.size(); ++stop) {
    StepLoader resumed(dataset, small_options(), whole[stop].next);
    for (std::size_t i = stop + 1; i < whole.size(); ++i)
      EXPECT_TRUE(same(resumed.next(), whole[i])) << stop << " " << i;
  }
  StepLoader at_the_end(dataset, small_options(), {0, 4});
  EXPECT_TRUE(same(at_the_end.next(), whole[4]));
}

TEST(StepLoader, DeliveryDoesNotDependOnThreadTimingOrStepsAhead) {
  const FakeDataset calm(24), jumpy(24, -1, true);
  StepLoader reference(calm, small_options(), {});
  LoaderOptions options = small_options();
  options.steps_ahead = 5;
  StepLoader other(jumpy, options, {});
  PhiloxStream random(3);
  for (int i = 0; i < 40; ++i) {
    for (auto n = random.next_below(300); n > 0; --n) std::this_thread::yield();
    EXPECT_TRUE(same(reference.next(), other.next())) << i;
  }
}

TEST(StepLoader, ErrorsOfTheThreadComeAtTheirPlaceAndStay) {
  const auto order = epoch_order(24, 42, 0, SamplingStrategy::random);
  const FakeDataset dataset(24, order[15]);  // in the third step of 7
  StepLoader loader(dataset, small_options(), {});
  EXPECT_EQ(loader.next().num_examples, 7);
  EXPECT_EQ(loader.next().num_examples, 7);
  for (int i = 0; i < 2; ++i)
    EXPECT_EQ(error_of(ErrorKind::data, [&] { loader.next(); }), "bad row " + std::to_string(order[15]));
}

TEST(StepLoader, DestructionStopsInTheMiddleOfAStep) {
  const FakeDataset dataset(3000000);
  LoaderOptions options;
  options.global_batch_size = 3000000;
  options.strategy = SamplingStrategy::sequential;
  {
    StepLoader loader(dataset, options, {});
    while (dataset.num_calls() == 0) std::this_thread::yield();
  }
  EXPECT_GT(dataset.num_calls(), 0);
  EXPECT_LT(dataset.num_calls(), dataset.size());
}

TEST(StepLoader, NeverRunsFurtherAheadThanAsked) {
  const FakeDataset dataset(700);
  LoaderOptions options = small_options();
  options.steps_ahead = 2;
  StepLoader loader(dataset, options, {});
  for (int step = 1; step <= 60; ++step) {
    loader.next();
    EXPECT_LE(dataset.num_calls(), 7 * (step + 3));  // two wait, one is in the making
  }
}

TEST(StepLoader, ImpossibleOptionsAndPositionsAreRefused) {
  const FakeDataset dataset(24);
  const auto with = [&](auto change) {
    LoaderOptions options = small_options();
    change(options);
    return error_of(ErrorKind::config, [&] { StepLoader(dataset, options, {}); });
  };
  EXPECT_EQ(with([](LoaderOptions& o) { o.global_batch_size = 0; }), "global_batch_size must be at least 1 (got 0)");
  EXPECT_EQ(with([](LoaderOptions& o) { o.micro_batch_size = 0; }),
            "per_device_train_batch_size must be at least 1 (got 0)");
  EXPECT_EQ(with([](LoaderOptions& o) { o.max_tokens_per_batch = -1; }),
            "max_tokens_per_batch must be at least 0 (got -1)");
  EXPECT_EQ(with([](LoaderOptions& o) { o.steps_ahead = 0; }), "steps_ahead must be at least 1 (got 0)");
  EXPECT_EQ(
      error_of(ErrorKind::data,
               [&] {
                 StepLoader(dataset, small_options(), {0, 5});
               }),
      "the saved position (epoch 0, step 5) does not exist in a data set of 4 steps an epoch; were the data or the "
      "batch size changed?");
}

}  // namespace
}  // namespace shardtune
