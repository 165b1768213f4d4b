// The hardest case first: tied weights x zero3 x recomputation x frozen embeddings, against a run without the engine.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "distributed/comm/thread_group.hpp"
#include "tests/parallel/toy_run.hpp"

namespace shardtune::toy {
namespace {

struct Case {
  Frozen frozen;
  at::ScalarType dtype;
};

class Spike : public testing::TestWithParam<Case> {};

TEST_P(Spike, GradientsHaveTheBitsOfThePlainRunUnderEveryPlanAndRankCount) {
  at::set_num_threads(1);
  int num_checked = 0;
  for (const std::int64_t v : {1, 3, 7}) {
    const Tensors wanted = reference_gradients(GetParam().frozen, GetParam().dtype, v);
    ASSERT_FALSE(wanted.empty());
    for (const std::string& plan : all_plans()) {
      for (const bool checkpointing : {false, true}) {
        for (const int ranks : {1, 2, 3, 4}) {
          const ToyRun run{.frozen = GetParam().frozen,
                           .plan = plan,
                           .dtype = GetParam().dtype,
                           .checkpointing = checkpointing,
                           .num_ranks = ranks,
                           .num_micro_batches = v};
          EXPECT_EQ(difference(gradients(run), wanted), "") << run.describe();
          ++num_checked;
        }
      }
    }
  }
  EXPECT_EQ(num_checked, 3 * 7 * 2 * 4);
}

std::string name_of(const testing::TestParamInfo<Case>& info) {
  const char* frozen[] = {"NothingFrozen", "PositionsFrozen", "TiedEmbeddingsFrozen", "AllButOneBlockFrozen"};
  return std::string(frozen[static_cast<int>(info.param.frozen)]) + (info.param.dtype == at::kFloat ? "Fp32" : "Bf16");
}

INSTANTIATE_TEST_SUITE_P(Toy, Spike,
                         testing::Values(Case{Frozen::nothing, at::kFloat}, Case{Frozen::positions, at::kFloat},
                                         Case{Frozen::embeddings, at::kFloat},
                                         Case{Frozen::all_but_one_block, at::kFloat},
                                         Case{Frozen::nothing, at::kBFloat16}, Case{Frozen::positions, at::kBFloat16},
                                         Case{Frozen::embeddings, at::kBFloat16},
                                         Case{Frozen::all_but_one_block, at::kBFloat16}),
                         name_of);

// The comparison above must notice a broken reduction: two bugs are planted.
GradientProbe on_rank(int rank, int culprit, GradientProbe probe) {
  return rank == culprit ? std::move(probe) : nullptr;
}

TEST(PlantedBug, ADroppedSliceTurnsTheComparisonRed) {
  at::set_num_threads(1);
  const Tensors wanted = reference_gradients(Frozen::positions, at::kFloat, 3);
  for (const std::string& plan : all_plans()) {
    ToyRun run{
        .frozen = Frozen::positions, .plan = plan, .checkpointing = true, .num_ranks = 3, .num_micro_batches = 3};
    run.make_probe = [](int rank) {
      return on_rank(rank, 1, [](const std::string& unit, const Pieces& gradients) {
        if (unit == "block.1") gradients[2].narrow(0, gradients[2].numel() - 256, 256).zero_();
      });
    };
    EXPECT_NE(difference(gradients(run), wanted), "") << plan;
    run.make_probe = nullptr;
    EXPECT_EQ(difference(gradients(run), wanted), "") << plan;
  }
}

TEST(PlantedBug, AWrongScaleTurnsTheComparisonRed) {
  at::set_num_threads(1);
  const Tensors wanted = reference_gradients(Frozen::positions, at::kBFloat16, 2);
  for (const std::string& plan : all_plans()) {
    ToyRun run{
        .frozen = Frozen::positions, .plan = plan, .dtype = at::kBFloat16, .num_ranks = 2, .num_micro_batches = 2};
    run.make_probe = [](int rank) {
      return on_rank(rank, 0, [](const std::string& unit, const Pieces& gradients) {
        if (unit == "root") gradients.front().mul_(1.0F + 1e-6F);
      });
    };
    EXPECT_NE(difference(gradients(run), wanted), "") << plan;
  }
}

TEST(Training, FinalWeightsHaveTheSameBitsUnderEveryPlanAndRankCount) {
  at::set_num_threads(1);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const std::int64_t v : {1, 3, 5}) {
      const ToyRun base{.frozen = Frozen::positions,
                        .plan = "ddp",
                        .dtype = dtype,
                        .num_micro_batches = v,
                        .num_steps = 4,
                        .max_grad_norm = 1.0};
      double base_norm = 0.0;
      const Tensors wanted = train(base, &base_norm);
      EXPECT_GT(base_norm, 1.0) << "clipping must be at work";
      for (const std::string& plan : all_plans()) {
        for (const int ranks : {1, 2, 3, 4}) {
          ToyRun run = base;
          run.plan = plan;
          run.num_ranks = ranks;
          run.checkpointing = ranks % 2 == 0;
          double norm = 0.0;
          EXPECT_EQ(difference(train(run, &norm), wanted), "") << run.describe();
          EXPECT_EQ(norm, base_norm) << run.describe();
        }
      }
    }
  }
}

TEST(Training, ALossScaleThatIsAPowerOfTwoChangesNoBitInFp32) {
  at::set_num_threads(1);
  ToyRun run{.frozen = Frozen::positions,
             .plan = "zero2",
             .num_ranks = 3,
             .num_micro_batches = 5,
             .num_steps = 4,
             .max_grad_norm = 1.0};
  const Tensors wanted = train(run);
  run.loss_scale = 65536.0;
  EXPECT_EQ(difference(train(run), wanted), "");
}

TEST(Training, GradientsReducedInBf16AreRoundedOnceAndCloseToThoseInFp32) {
  at::set_num_threads(1);
  for (const std::string& plan : all_plans()) {
    ToyRun run{.plan = plan, .num_ranks = 4, .num_micro_batches = 6};
    const Tensors exact = gradients(run);
    run.reduce_dtype = at::kBFloat16;
    double largest = 0.0;
    for (const auto& [name, rounded] : gradients(run)) {
      const at::Tensor error = (rounded - exact.at(name)).norm() / exact.at(name).norm();
      largest = std::max(largest, error.item<double>());
    }
    EXPECT_GT(largest, 1e-4) << plan;  // it was rounded
    EXPECT_LT(largest, 4e-3) << plan;  // half a unit in the last of bf16's eight bits
  }
}

TEST(Training, AnOverflowOnOneRankIsSeenByAllRanks) {
  for (const std::string& plan : all_plans()) {
    ToyRun run{.plan = plan, .dtype = at::kHalf, .num_ranks = 4, .num_micro_batches = 4, .loss_scale = 1024.0};
    run.make_probe = [](int rank) -> GradientProbe {
      if (rank != 2) return nullptr;
      return [](const std::string& unit, const Pieces& gradients) {
        if (unit == "block.1") gradients.front()[7] = std::numeric_limits<float>::infinity();
      };
    };
    std::atomic<int> num_overflowed = 0;
    run_thread_ranks(run.num_ranks, [&](Communicator& world) {
      at::set_num_threads(1);
      Rank rank(run, world);
      run_micro_batches(rank, run, 0);
      num_overflowed += std::isfinite(rank.engine.grad_norm()) ? 0 : 1;
      rank.engine.after_optimizer_step();
    });
    EXPECT_EQ(num_overflowed, 4) << plan;
  }
}

TEST(Training, LearnsTheToyTask) {
  // A wrong sign or a stale compute copy would pass every comparison of runs with each other.
  ToyRun run{.frozen = Frozen::nothing,
             .plan = "zero3",
             .dtype = at::kBFloat16,
             .num_ranks = 2,
             .num_micro_batches = 2,
             .num_steps = 30,
             .num_distinct_steps = 2};
  const Tensors weights = train(run);
  Model model(run.frozen);
  PlainRunner runner;
  Tensors start;
  for (Parameter* p : model.parameters()) start[p->name] = initial_weight(*p);
  const auto loss_with = [&](const Tensors& values) {
    set_plain_values(model, values, at::kFloat);
    double sum = 0.0;
    for (int step = 0; step < 2; ++step) sum += model.loss(make_batch(step, 0), runner).item<double>();
    return sum;
  };
  EXPECT_LT(loss_with(weights), 0.5 * loss_with(start));
}

}  // namespace
}  // namespace shardtune::toy
