// The parity matrix on thread ranks, and that it is able to fail.
#include <atomic>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "distributed/comm/thread_group.hpp"
#include "tests/parallel/parity_cases.hpp"
#include "tests/parallel/wrapping_communicator.hpp"

namespace shardtune::toy {
namespace {

class Parity : public testing::TestWithParam<int> {};

TEST_P(Parity, FinalWeightsHaveTheBitsOfOneRank) {
  at::set_num_threads(1);
  const ParityRow row = parity_rows()[static_cast<std::size_t>(GetParam())];
  double wanted_norm = 0.0;
  const Tensors wanted = train(row.base, &wanted_norm);
  EXPECT_GT(wanted_norm, 1.0) << "clipping must be at work";
  int num_checked = 0;
  for (const std::string& plan : all_plans()) {
    for (const RecomputeOptions& recompute : row.recompute) {
      for (const int ranks : {1, 2, 3, 4, 8}) {
        ToyRun run = row.base;
        run.plan = plan;
        run.recompute = recompute;
        run.num_ranks = ranks;
        run.is_network = num_checked % 2 == 1;
        double norm = 0.0;
        EXPECT_EQ(difference(train(run, &norm), wanted), "") << run.describe();
        EXPECT_EQ(norm, wanted_norm) << run.describe();
        ++num_checked;
      }
    }
  }
  EXPECT_EQ(num_checked, 7 * 3 * 5);
}

std::string name_of(const testing::TestParamInfo<int>& info) {
  const ToyRun base = parity_rows()[static_cast<std::size_t>(info.param)].base;
  return std::string(at::toString(base.dtype)) + std::to_string(base.num_micro_batches) + "MicroBatches";
}

INSTANTIATE_TEST_SUITE_P(Matrix, Parity, testing::Range(0, 6), name_of);

// A planted bug per kind of communication: each must turn the comparison red under every plan that communicates so.
enum class Bug { gradient_scaled, gradient_slice_lost, gather_bit_flipped, copy_bit_flipped, reduction_bit_flipped };

void flip_sign(at::Tensor element) { element.neg_(); }

// Spoils what rank 1 of 4 moves through its communicator.
CommunicatorHooks spoiling_hooks(Bug bug, at::ScalarType dtype, std::int64_t own_element) {
  CommunicatorHooks hooks;
  hooks.has_shared_memory = bug != Bug::gather_bit_flipped;
  struct Seen {
    int num = 0;
    std::vector<at::Tensor> copies;  // of gathered weights
  };
  const auto seen = std::make_shared<Seen>();
  hooks.after = [=](const std::string& operation, const at::Tensor& out) {
    if (operation == "make_shared") seen->copies.push_back(out);
    const bool is_reduction = operation == "all_to_all" || operation == "reduce_scatter" || operation == "all_reduce";
    const bool is_hit = (bug == Bug::gather_bit_flipped && operation == "all_gather") ||
                        (bug == Bug::reduction_bit_flipped && is_reduction);
    if (!is_hit || !out.is_floating_point() || out.numel() < 1000 || ++seen->num != 4) return;
    const at::Tensor elements = out.flatten();
    if (bug == Bug::reduction_bit_flipped) return flip_sign(elements[out.abs().argmax().item<std::int64_t>()]);
    // Of two different ranks: what a rank has gathered of itself it does not use.
    flip_sign(elements[0]);
    flip_sign(elements[out.numel() - 1]);
  };
  hooks.before = [=](const std::string& operation, const at::Tensor&) {
    if (bug != Bug::copy_bit_flipped || operation != "publish" || seen->num++ > 0) return;
    flip_sign(seen->copies.front().view(dtype)[own_element]);  // the root's is filled first
  };
  return hooks;
}

bool is_red(const ToyRun& base, const std::string& plan, Bug bug, const Tensors& wanted) {
  ToyRun run = base;
  run.plan = plan;
  run.num_ranks = 4;
  run.make_probe = [bug](int rank) -> GradientProbe {
    if (rank != 1) return nullptr;
    if (bug == Bug::gradient_scaled) {
      return [](const std::string&, const Pieces& gradients) {
        for (at::Tensor gradient : gradients) gradient.mul_(1.0F + 1e-3F);
      };
    }
    if (bug == Bug::gradient_slice_lost) {
      return [](const std::string& unit, const Pieces& gradients) {
        if (unit == "block.1") gradients[2].narrow(0, gradients[2].numel() - 256, 256).zero_();
      };
    }
    return nullptr;
  };
  bool is_different = false;
  run_thread_ranks(run.num_ranks, [&](Communicator& world) {
    CommunicatorHooks hooks;
    hooks.has_shared_memory = bug != Bug::gather_bit_flipped;
    // In the first parameter's slice that this rank writes.
    const BlockLayout table(initial_weight(*Model(run.frozen).parameters().front()).numel(), 4);
    const std::int64_t own_element = table.begin(plan.starts_with("hsdp") ? 2 : 1) + 1;
    if (world.rank() == 1) hooks = spoiling_hooks(bug, run.dtype, own_element);
    WrappingCommunicator used(world, hooks);
    bool is_different_here = false;
    train_on_rank(run, used, [&](const ShardedParameter& p, const at::Tensor& master) {
      const at::Tensor whole = wanted.at(p.parameter->name).reshape({-1});
      is_different_here = is_different_here || !at::equal(master, whole.narrow(0, p.master_offset, master.numel()));
    });
    at::Tensor word = at::full({1}, is_different_here ? 1 : 0, at::kLong);
    world.all_reduce(word, ReduceOp::max).wait();
    if (world.rank() == 0) is_different = word.item<std::int64_t>() != 0;
  });
  return is_different;
}

// What the matrix above has no room for: gathering through buckets where there is no shared memory, and buckets so
// small that every unit takes several.
TEST(Parity, HoldsWithoutSharedMemoryAndInSmallBuckets) {
  at::set_num_threads(1);
  for (const ParityRow& row : parity_rows()) {
    const Tensors wanted = train(row.base);
    for (const std::string& plan : all_plans()) {
      for (const bool has_shared_memory : {false, true}) {
        for (const std::int64_t bucket_bytes : {std::int64_t{4096}, kDefaultBucketBytes}) {
          ToyRun run = row.base;
          run.plan = plan;
          run.bucket_bytes = bucket_bytes;
          run.num_ranks = has_shared_memory ? 3 : 4;
          std::atomic<int> num_different = 0;
          run_thread_ranks(run.num_ranks, [&](Communicator& world) {
            CommunicatorHooks hooks;
            hooks.has_shared_memory = has_shared_memory;
            hooks.is_network = bucket_bytes == 4096;
            WrappingCommunicator used(world, hooks);
            train_on_rank(run, used, [&](const ShardedParameter& p, const at::Tensor& got) {
              const at::Tensor whole = wanted.at(p.parameter->name).reshape({-1});
              if (!at::equal(got, whole.narrow(0, p.master_offset, got.numel()))) ++num_different;
            });
          });
          EXPECT_EQ(num_different, 0) << run.describe() << " buckets " << bucket_bytes;
        }
      }
    }
  }
}

// Ranks that have no micro-batch in a step bring their weights up to date at its end, the others while they compute;
// both must gather in the same order, also in buckets that the parts of this many ranks do not fill.
TEST(Parity, HoldsWhereSomeRanksHaveNoMicroBatchAndUnitsTakeSeveralBuckets) {
  at::set_num_threads(1);
  ToyRun base{.plan = "ddp", .num_micro_batches = 2, .num_steps = 3};
  const Tensors wanted = train(base);
  for (const std::string& plan : all_plans()) {
    for (const int num_ranks : {3, 5, 7}) {
      ToyRun run = base;
      run.plan = plan;
      run.num_ranks = num_ranks;
      run.bucket_bytes = 512;
      EXPECT_EQ(difference(train(run), wanted), "") << run.describe();
    }
  }
}

class PlantedBug : public testing::TestWithParam<int> {};

TEST_P(PlantedBug, TurnsTheMatrixRedUnderEveryPlan) {
  at::set_num_threads(1);
  const ParityRow row = parity_rows()[static_cast<std::size_t>(GetParam())];
  const Tensors wanted = train(row.base);
  ToyRun base = row.base;
  base.recompute = row.recompute.back();
  if (GetParam() == 0) base.recompute = row.recompute.front();
  for (const std::string& plan : all_plans()) {
    for (const Bug bug : {Bug::gradient_scaled, Bug::gradient_slice_lost, Bug::gather_bit_flipped,
                          Bug::copy_bit_flipped, Bug::reduction_bit_flipped}) {
      const bool has_copies = plan.starts_with("zero3") || plan.starts_with("hsdp");
      if (bug == Bug::copy_bit_flipped && !has_copies) continue;
      EXPECT_TRUE(is_red(base, plan, bug, wanted)) << plan << " bug " << static_cast<int>(bug);
    }
  }
}

// The plainest row; and bf16, three micro-batches per rank, every second unit recomputed but for its attention.
INSTANTIATE_TEST_SUITE_P(Rows, PlantedBug, testing::Values(0, 3), name_of);

}  // namespace
}  // namespace shardtune::toy
