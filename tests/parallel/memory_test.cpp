// What the engine holds and what it frees: masters, compute copies, gradients, activations.
#include <atomic>
#include <map>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/memory.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/parallel/toy_run.hpp"
#include "tests/parallel/wrapping_communicator.hpp"

namespace shardtune::toy {
namespace {

class Memory : public testing::TestWithParam<bool> {};

TEST_P(Memory, UnderZero3AUnitsWeightsExistOnlyWhileItRuns) {
  const ToyRun run{.frozen = Frozen::positions,
                   .plan = "zero3",
                   .dtype = at::kBFloat16,
                   .checkpointing = GetParam(),
                   .num_ranks = 3,
                   .num_micro_batches = 5};
  std::atomic<int> num_inside = 0;
  run_thread_ranks(run.num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    Rank rank(run, world);
    const auto units = rank.model.units();
    for (const Unit* unit : units) EXPECT_EQ(storage_bytes(*unit), 0) << unit->name;
    rank.model.in_block = [&](const Unit& running) {
      ++num_inside;
      for (const Unit* unit : units) {
        const bool is_there = unit == &running || unit->is_root;
        EXPECT_EQ(storage_bytes(*unit), is_there ? full_bytes(*unit) : 0) << unit->name << " in " << running.name;
      }
    };
    run_micro_batches(rank, run, 0);
    for (const Unit* unit : units) EXPECT_EQ(storage_bytes(*unit), 0) << unit->name;
    EXPECT_EQ(rank.engine.memory().compute.peak(), 0);
    // Of the root and of three other units there is one copy for all ranks: never the whole model.
    std::int64_t largest = 0;
    for (const auto& unit : rank.engine.units()) {
      if (!unit->unit().is_root) largest = std::max(largest, unit->shared_copy_bytes());
    }
    const std::int64_t copies = rank.engine.units()[0]->shared_copy_bytes() + 3 * largest;
    const std::int64_t buckets = rank.engine.buffers().shards.num_made() * rank.engine.buffers().shards.bucket_bytes();
    EXPECT_NEAR(rank.engine.memory().buffers.current(), copies / run.num_ranks + buckets, 16);
  });
  // 3 blocks x 3 ranks x 2 rounds, again when recomputed.
  EXPECT_EQ(num_inside, 18 * (GetParam() ? 2 : 1));
}

INSTANTIATE_TEST_SUITE_P(Checkpointing, Memory, testing::Bool());

// Where the weights of a unit lie while it runs, by unit.
std::map<std::string, const void*> places_of_weights(Rank& rank, const ToyRun& run) {
  std::map<std::string, const void*> places;
  rank.model.in_block = [&](const Unit& unit) { places[unit.name] = unit.parameters.front()->value.const_data_ptr(); };
  run_micro_batches(rank, run, 0);
  rank.engine.after_optimizer_step();
  rank.model.in_block = nullptr;
  return places;
}

TEST(Memory, UnderZero3TheRanksOfANodeComputeWithOneCopy) {
  const ToyRun run{.plan = "zero3", .dtype = at::kBFloat16, .num_ranks = 3, .num_micro_batches = 3};
  std::vector<std::map<std::string, const void*>> places(3);
  run_thread_ranks(run.num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    Rank rank(run, world);
    places[static_cast<std::size_t>(world.rank())] = places_of_weights(rank, run);
  });
  EXPECT_EQ(places[0].size(), 3U);
  EXPECT_EQ(places[1], places[0]);
  EXPECT_EQ(places[2], places[0]);
}

TEST(Memory, NothingIsMadeToCommunicateThroughAfterTheFirstStep) {
  for (const std::string& plan : all_plans()) {
    for (const bool has_shared_memory : {false, true}) {
      const ToyRun run{.plan = plan, .num_ranks = 4, .num_micro_batches = 6, .bucket_bytes = 4096};
      run_thread_ranks(run.num_ranks, [&](Communicator& world) {
        at::set_num_threads(1);
        int num_made = 0;
        CommunicatorHooks hooks;
        hooks.has_shared_memory = has_shared_memory;
        hooks.after = [&](const std::string& operation, const at::Tensor&) {
          num_made += operation.starts_with("make_") ? 1 : 0;
        };
        WrappingCommunicator watched(world, hooks);
        Rank rank(run, watched);
        for (int step = 0; step < 4; ++step) {
          const int num_before = num_made;
          run_micro_batches(rank, run, step);
          rank.engine.after_optimizer_step();
          if (step > 0) {
            EXPECT_EQ(num_made, num_before) << plan << " step " << step;
          }
        }
        EXPECT_GT(num_made, 0) << plan;
        EXPECT_EQ(rank.engine.memory().buffers.peak(), rank.engine.memory().buffers.current());
      });
    }
  }
}

TEST(Memory, FrozenWeightsMayExistOnceAmongTheRanksOfANode) {
  for (const std::string plan : {"ddp", "zero1", "zero2"}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const ToyRun run{
          .frozen = Frozen::embeddings, .plan = plan, .dtype = dtype, .num_ranks = 4, .num_micro_batches = 4};
      const Tensors wanted = reference_gradients(run.frozen, dtype, run.num_micro_batches);
      std::vector<std::map<std::string, const void*>> places(4);
      run_thread_ranks(run.num_ranks, [&](Communicator& world) {
        at::set_num_threads(1);
        ToyRun shared = run;
        shared.share_frozen_on_host = world.rank() < 2 ? "a" : "b";
        Rank rank(shared, world);
        for (const Parameter* p : rank.model.parameters()) {
          if (!p->is_trainable) places[static_cast<std::size_t>(world.rank())][p->name] = p->value.const_data_ptr();
          EXPECT_TRUE(at::equal(p->value, initial_weight(*p).to(dtype))) << p->name;
        }
        run_micro_batches(rank, run, 0);
        for (const ShardedParameter* p : rank.engine.trainable()) {
          const at::Tensor whole = wanted.at(p->parameter->name).reshape({-1});
          EXPECT_TRUE(at::equal(p->slice_of(p->gradient), whole.narrow(0, p->slice_offset(), p->slice_numel())));
        }
        const Rank unshared(run, world);
        EXPECT_LT(rank.engine.memory().masters.current() + rank.engine.memory().compute.current(),
                  unshared.engine.memory().masters.current() + unshared.engine.memory().compute.current());
        world.barrier();  // nobody's memory goes while others look at it
      });
      EXPECT_GE(places[0].size(), 2U);
      EXPECT_EQ(places[1], places[0]);
      EXPECT_EQ(places[3], places[2]);
      EXPECT_NE(places[2], places[0]);
    }
  }
}

TEST(Memory, ARankThatFailsDoesNotLeaveOthersWaitingForASharedCopy) {
  for (const std::string plan : {"zero3", "zero3_kept"}) {
    const ToyRun run{.plan = plan, .num_ranks = 3, .num_micro_batches = 3};
    try {
      run_thread_ranks(run.num_ranks, [&](Communicator& world) {
        at::set_num_threads(1);
        Rank rank(run, world);
        rank.model.in_block = [&](const Unit& unit) {
          if (world.rank() == 1 && unit.name == "block.1") fail(ErrorKind::numeric, "planted");
        };
        run_micro_batches(rank, run, 0);
        ADD_FAILURE() << "rank " << world.rank() << " came to the end of the step";
      });
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::numeric);
    }
  }
}

TEST(Memory, MastersAreCutUnderEveryPlanButDdpAndOneFp32CopyServesBothPurposes) {
  for (const std::string& plan : all_plans()) {
    const ToyRun run{.plan = plan, .num_ranks = 4};
    std::atomic<std::int64_t> total = 0;
    std::int64_t model_bytes = 0;
    Model model(run.frozen);
    for (const Parameter* p : model.parameters()) model_bytes += 4 * p->numel();
    run_thread_ranks(run.num_ranks, [&](Communicator& world) {
      at::set_num_threads(1);
      const Rank rank(run, world);
      const MemoryUse& held = rank.engine.memory();
      total += held.masters.current();
      const bool frees = rank.engine.plan().reshard_after_backward;
      EXPECT_EQ(held.compute.current(), frees ? 0 : model_bytes - held.masters.current()) << plan;
    });
    const int copies = plan == "ddp" ? 4 : plan.starts_with("hsdp") ? 2 : 1;
    EXPECT_EQ(total, copies * model_bytes) << plan;
  }
}

TEST(Memory, FrozenParametersHoldNoFp32MasterWhereTheComputeDtypeHoldsTheirValues) {
  for (const std::string& plan : all_plans()) {
    for (const bool fits : {true, false}) {
      const ToyRun run{
          .frozen = Frozen::all_but_one_block, .plan = plan, .dtype = at::kBFloat16, .num_ranks = 2, .num_steps = 1};
      run_thread_ranks(run.num_ranks, [&](Communicator& world) {
        at::set_num_threads(1);
        Model model(run.frozen);
        ParallelEngine engine(model.units(), world, parallel_options(run, world.size()));
        const auto weight_of = [&](const ShardedParameter& p) {
          const at::Tensor weight = initial_weight(*p.parameter).view({-1});
          return fits ? weight.to(at::kBFloat16).to(at::kFloat) : weight;
        };
        for (ShardedParameter* p : engine.parameters())
          p->slice_of(p->master).copy_(weight_of(*p).narrow(0, p->slice_offset(), p->slice_numel()));
        engine.weights_loaded();
        std::int64_t bytes = 0;
        for (const ShardedParameter* p : engine.parameters()) {
          const bool is_small = !p->parameter->is_trainable;
          if (fits) {
            EXPECT_EQ(p->master.scalar_type(), is_small ? at::kBFloat16 : at::kFloat) << p->parameter->name;
          }
          EXPECT_TRUE(at::equal(p->slice_of(p->master).to(at::kFloat),
                                weight_of(*p).narrow(0, p->slice_offset(), p->slice_numel())));
          const bool is_alias = p->parameter->value.storage().data() == p->master.storage().data();
          bytes += is_alias ? 0 : static_cast<std::int64_t>(p->master.nbytes());
        }
        EXPECT_EQ(engine.memory().masters.current(), bytes) << plan;
      });
    }
  }
}

TEST(Memory, NothingOfAStepStaysBehind) {
  for (const std::string& plan : all_plans()) {
    for (const bool checkpointing : {false, true}) {
      const ToyRun run{.frozen = Frozen::embeddings,
                       .plan = plan,
                       .checkpointing = checkpointing,
                       .num_ranks = 2,
                       .num_micro_batches = 3};
      run_thread_ranks(run.num_ranks, [&](Communicator& world) {
        at::set_num_threads(1);
        Rank rank(run, world);
        std::weak_ptr<int> alive;
        {
          auto token = std::make_shared<int>(0);  // lives in the closure of every block, so in every retained graph
          alive = token;
          rank.model.in_block = [token](const Unit&) {};
        }
        run_micro_batches(rank, run, 0);
        for (const Parameter* p : rank.model.parameters()) {
          EXPECT_FALSE(p->value.grad().defined()) << p->name;
          // A graph that outlived its backward would hold the weight's tensor through its saved variables.
          EXPECT_EQ(p->value.use_count(), 1) << p->name;
        }
        for (const ShardedParameter* p : rank.engine.parameters()) {
          EXPECT_EQ(p->gradient.defined(), p->parameter->is_trainable) << p->parameter->name;
        }
        EXPECT_EQ(rank.engine.memory().partial_sums.current(), 0);
        EXPECT_GT(rank.engine.memory().partial_sums.peak(), 0);
        rank.engine.after_optimizer_step();
        EXPECT_EQ(rank.engine.memory().gradients.current(), 0);
        for (const ShardedParameter* p : rank.engine.parameters()) EXPECT_FALSE(p->gradient.defined());
        rank.model.in_block = nullptr;
        EXPECT_TRUE(alive.expired());
      });
    }
  }
}

// Bytes kept by the graph of one forward pass, by recomputation.
std::int64_t kept_bytes(RecomputeOptions recompute, int num_earlier_steps = 0) {
  const auto world = make_self_communicator();
  Rank rank({.plan = "ddp", .recompute = recompute}, *world);
  for (int i = 0; i < num_earlier_steps; ++i) run_micro_batches(rank, {.num_micro_batches = 1}, 0);
  rank.engine.begin_step(1);
  rank.engine.begin_micro_batch(0);
  const std::int64_t before = tensor_bytes();
  const at::Tensor loss = rank.model.loss(make_batch(0, 0), rank.engine.runner());
  const std::int64_t kept = tensor_bytes() - before;
  rank.engine.backward(loss);
  return kept;
}

TEST(Recompute, KeepsLessTheMoreIsRecomputed) {
  install_tensor_memory_counter();
  const std::int64_t none = kept_bytes({});
  const std::int64_t every_second = kept_bytes({.mode = RecomputeMode::full, .every = 2});
  const std::int64_t selective = kept_bytes({.mode = RecomputeMode::selective});
  const std::int64_t full = kept_bytes({.mode = RecomputeMode::full});
  EXPECT_LT(full, selective);
  EXPECT_LT(selective, none);
  EXPECT_LT(full, every_second);
  EXPECT_LT(every_second, none);
}

TEST(Recompute, ABudgetIsUsedButNotExceeded) {
  install_tensor_memory_counter();
  const std::int64_t none = kept_bytes({});
  const std::int64_t full = kept_bytes({.mode = RecomputeMode::full});
  // The first micro-batch measures, so a second one is looked at.
  EXPECT_EQ(kept_bytes({.budget_bytes = 1}, 1), full);
  EXPECT_EQ(kept_bytes({.budget_bytes = none}, 1), none);
  const std::int64_t budget = (none - full) / 2;
  const std::int64_t kept = kept_bytes({.budget_bytes = budget}, 1);
  EXPECT_LE(kept - full, budget);
  EXPECT_GT(kept - full, budget / 3);
}

}  // namespace
}  // namespace shardtune::toy
