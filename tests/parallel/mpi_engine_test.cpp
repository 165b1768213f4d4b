// The engine between processes: the same bits as one rank alone.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "tests/parallel/toy_run.hpp"
#include "tests/support/mpi_test.hpp"

namespace shardtune::toy {
namespace {

// Compares this rank's part, whole tensors where the plan keeps them whole.
Sink compare_with(const Tensors& wanted, const ToyRun& run, int& num_compared) {
  return [&wanted, &run, &num_compared](const ShardedParameter& p, const at::Tensor& got) {
    const at::Tensor whole = wanted.at(p.parameter->name).reshape({-1});
    EXPECT_TRUE(at::equal(got, whole.narrow(0, p.master_offset, got.numel())))
        << p.parameter->name << " " << run.describe();
    ++num_compared;
  };
}

TEST(MpiEngine, GradientsHaveTheBitsOfThePlainRun) {
  at::set_num_threads(1);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const std::int64_t v : {1, 2, 5}) {
      const Tensors wanted = reference_gradients(Frozen::positions, dtype, v);
      for (const std::string& plan : all_plans()) {
        const ToyRun run{.frozen = Frozen::positions,
                         .plan = plan,
                         .dtype = dtype,
                         .checkpointing = v != 2,
                         .num_ranks = mpi_world().size(),
                         .num_micro_batches = v};
        int num_compared = 0;
        gradients_on_rank(run, mpi_world(), compare_with(wanted, run, num_compared));
        EXPECT_EQ(num_compared, static_cast<int>(wanted.size()));
      }
    }
  }
}

TEST(MpiEngine, FinalWeightsHaveTheBitsOfOneRankAlone) {
  at::set_num_threads(1);
  ToyRun run{.frozen = Frozen::positions,
             .plan = "ddp",
             .dtype = at::kBFloat16,
             .num_micro_batches = 3,
             .num_steps = 5,
             .max_grad_norm = 1.0};
  double wanted_norm = 0.0;
  const Tensors wanted = train(run, &wanted_norm);
  run.num_ranks = mpi_world().size();
  for (const std::string& plan : all_plans()) {
    run.plan = plan;
    run.checkpointing = run.plan == "zero3";
    int num_compared = 0;
    EXPECT_EQ(train_on_rank(run, mpi_world(), compare_with(wanted, run, num_compared)), wanted_norm);
    EXPECT_EQ(num_compared, static_cast<int>(wanted.size()));
  }
}

}  // namespace
}  // namespace shardtune::toy
