// --reduction fast: the sums of the tree to rounding, the same bits every time, and fewer collectives.
#include <atomic>
#include <cmath>
#include <map>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "distributed/comm/thread_group.hpp"
#include "tests/parallel/toy_run.hpp"
#include "tests/parallel/wrapping_communicator.hpp"

namespace shardtune::toy {
namespace {

constexpr std::int64_t kMicroBatches[] = {1, 5, 12};  // also fewer than ranks, and not a multiple of them

// |got - wanted| / |wanted| over all tensors.
double distance(const Tensors& got, const Tensors& wanted) {
  EXPECT_EQ(got.size(), wanted.size());
  double error = 0.0;
  double size = 0.0;
  for (const auto& [name, tensor] : wanted) {
    error += (got.at(name) - tensor).to(at::kDouble).square().sum().item<double>();
    size += tensor.to(at::kDouble).square().sum().item<double>();
  }
  return std::sqrt(error / size);
}

class FastReduction : public testing::TestWithParam<at::ScalarType> {};

TEST_P(FastReduction, SumsAreThoseOfTheTreeToRounding) {
  at::set_num_threads(1);
  int num_different = 0;
  for (const std::int64_t v : kMicroBatches) {
    ToyRun run{.frozen = Frozen::positions, .plan = "ddp", .dtype = GetParam(), .num_micro_batches = v};
    const Tensors wanted = gradients(run);
    // V sums in another order, each off by half a unit of at most the sum of all magnitudes, which is below V times the
    // result's where gradients of a step do not cancel.
    const double bound = static_cast<double>(v * v) * 0x1p-24;
    run.reduction = ReductionOrder::fast;
    for (const std::string& plan : all_plans()) {
      for (const int ranks : {1, 2, 3, 4, 8}) {
        run.plan = plan;
        run.num_ranks = ranks;
        run.is_network = false;
        const Tensors got = gradients(run);
        EXPECT_LE(distance(got, wanted), bound) << run.describe();
        run.is_network = true;  // more is under way at once; what is added in which order stays
        EXPECT_EQ(difference(gradients(run), got), "") << "another run: " << run.describe();
        num_different += difference(got, wanted).empty() ? 0 : 1;
      }
    }
  }
  EXPECT_GT(num_different, 0) << "nothing was added in another order";
}

INSTANTIATE_TEST_SUITE_P(Precisions, FastReduction, testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& instance) { return std::string(at::toString(instance.param)); });

TEST(FastReduction, WhatTravelsInBf16IsRoundedToIt) {
  at::set_num_threads(1);
  ToyRun run{.plan = "ddp", .num_micro_batches = 5};
  const Tensors wanted = gradients(run);
  run.reduction = ReductionOrder::fast;
  run.reduce_dtype = at::kBFloat16;
  for (const std::string& plan : all_plans()) {
    run.plan = plan;
    run.num_ranks = 4;
    const double error = distance(gradients(run), wanted);
    EXPECT_LE(error, 4 * 0x1p-8) << plan;  // rounded when sent and when summed, under hsdp twice
    EXPECT_GT(error, 0x1p-12) << plan << " sends fp32";
  }
}

// Steps after the first must not see what is left of it, and skipped rounds must not be counted.
TEST(FastReduction, TrainsToTheWeightsOfTheTreeAndAgainToTheSameBits) {
  at::set_num_threads(1);
  ToyRun run{.plan = "ddp", .num_micro_batches = 5, .num_steps = 4, .max_grad_norm = 1.0};
  const Tensors wanted = train(run);
  run.reduction = ReductionOrder::fast;
  for (const std::string& plan : all_plans()) {
    for (const bool checkpointing : {false, true}) {
      run.plan = plan;
      run.checkpointing = checkpointing;
      run.num_ranks = 4;
      const Tensors got = train(run);
      // AdamW's first steps divide a gradient by its own size: near zero they turn rounding into a part of the step.
      EXPECT_LE(distance(got, wanted), 1e-3) << run.describe();
      EXPECT_EQ(difference(train(run), got), "") << run.describe();
    }
  }
}

TEST(FastReduction, ASliceLostIsSeen) {
  at::set_num_threads(1);
  ToyRun run{.plan = "ddp", .num_micro_batches = 5};
  const Tensors wanted = gradients(run);
  run.reduction = ReductionOrder::fast;
  run.num_ranks = 4;
  run.make_probe = [](int rank) -> GradientProbe {
    if (rank != 1) return nullptr;
    return [](const std::string& unit, const Pieces& gradients) {
      if (unit == "block.1") gradients[2].narrow(0, gradients[2].numel() - 256, 256).zero_();
    };
  };
  for (const std::string& plan : all_plans()) {
    run.plan = plan;
    EXPECT_GT(distance(gradients(run), wanted), 25 * 0x1p-24) << plan;
  }
}

std::map<std::string, int> collectives_of_rank_0(const ToyRun& run) {
  std::map<std::string, int> counts;
  run_thread_ranks(run.num_ranks, [&](Communicator& world) {
    CommunicatorHooks hooks;
    hooks.before = [&](const std::string& operation, const at::Tensor&) {
      if (world.rank() == 0) ++counts[operation];
    };
    WrappingCommunicator counted(world, hooks);
    gradients_on_rank(run, counted, [](const ShardedParameter&, const at::Tensor&) {});
  });
  return counts;
}

TEST(FastReduction, PlansThatReduceOnceReduceEveryUnitOnce) {
  at::set_num_threads(1);
  ToyRun run{.num_ranks = 4, .num_micro_batches = 12};
  for (const char* plan : {"ddp", "zero1"}) {
    run.plan = plan;
    run.reduction = ReductionOrder::fast;
    const auto fast = collectives_of_rank_0(run);
    EXPECT_FALSE(fast.contains("all_to_all")) << plan;
    const auto num_reductions = [](std::map<std::string, int> of) {
      return of["all_to_all"] + of["reduce_scatter"] + of["all_reduce"];
    };
    run.num_micro_batches = 4;
    EXPECT_EQ(collectives_of_rank_0(run), fast) << "accumulation costs no communication under " << plan;
    run.num_micro_batches = 12;
    run.reduction = ReductionOrder::tree;
    EXPECT_GT(num_reductions(collectives_of_rank_0(run)), num_reductions(fast)) << plan;
  }
}

}  // namespace
}  // namespace shardtune::toy
