// A third of the parity matrix between processes, at each rank count and over each transport the test is started with.
#include <cstdlib>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "distributed/comm/transport_seams.hpp"
#include "tests/parallel/parity_cases.hpp"
#include "tests/support/mpi_test.hpp"

namespace shardtune::toy {
namespace {

TEST(MpiParity, RunsOverTheTransportThatItIsMeantFor) {
  const char* expected = std::getenv("SHARDTUNE_EXPECTED_TRANSPORT");
  ASSERT_NE(expected, nullptr);
  EXPECT_EQ(describe_transport(mpi_world()), expected);
}

TEST(MpiParity, FinalWeightsHaveTheBitsOfOneRank) {
  at::set_num_threads(1);
  int num_cases = 0;
  int num_checked = 0;
  for (const ParityRow& row : parity_rows()) {
    double wanted_norm = 0.0;
    const Tensors wanted = train(row.base, &wanted_norm);
    for (const std::string& plan : all_plans()) {
      for (const RecomputeOptions& recompute : row.recompute) {
        const int diagonal = num_cases / 3 + num_cases + mpi_world().size();
        ++num_cases;
        if (diagonal % 3 != 0) continue;
        ToyRun run = row.base;
        run.plan = plan;
        run.recompute = recompute;
        run.num_ranks = mpi_world().size();
        int num_compared = 0;
        const double norm = train_on_rank(run, mpi_world(), [&](const ShardedParameter& p, const at::Tensor& got) {
          const at::Tensor whole = wanted.at(p.parameter->name).reshape({-1});
          EXPECT_TRUE(at::equal(got, whole.narrow(0, p.master_offset, got.numel())))
              << p.parameter->name << " " << run.describe();
          ++num_compared;
        });
        EXPECT_EQ(norm, wanted_norm) << run.describe();
        EXPECT_EQ(num_compared, static_cast<int>(wanted.size()));
        ++num_checked;
      }
    }
  }
  EXPECT_EQ(num_cases, 6 * 7 * 3);
  EXPECT_GT(4 * num_checked, num_cases);
}

}  // namespace
}  // namespace shardtune::toy
