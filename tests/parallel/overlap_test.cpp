// The order in which communication is issued: early enough to be hidden. (How much is hidden: benchmarks/overlap.)
#include <algorithm>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "distributed/comm/thread_group.hpp"
#include "tests/parallel/toy_run.hpp"
#include "tests/parallel/wrapping_communicator.hpp"

namespace shardtune::toy {
namespace {

using Events = std::vector<std::string>;

struct Watch {
  int num_earlier_steps = 0;
  bool has_shared_memory = false;
  bool sees_waits = false;  // as "done"
  bool is_network = false;
};

// What rank 0 of two issues and computes in one step.
Events events_of_a_step(ToyRun run, const Watch& watch = {}) {
  run.num_ranks = 2;
  Events events;
  run_thread_ranks(2, [&](Communicator& world) {
    at::set_num_threads(1);
    const bool is_watched = world.rank() == 0;
    CommunicatorHooks hooks;
    hooks.has_shared_memory = watch.has_shared_memory;
    hooks.is_network = watch.is_network;
    if (is_watched) {
      hooks.before = [&](const std::string& operation, const at::Tensor&) {
        const bool is_reduction = operation == "all_to_all" || operation == "reduce_scatter";
        events.push_back(is_reduction ? "reduce" : operation);
      };
      if (watch.sees_waits) {
        hooks.after = [&](const std::string& operation, const at::Tensor&) {
          if (!operation.starts_with("make")) events.emplace_back("done");
        };
      }
    }
    WrappingCommunicator watched(world, hooks);
    Rank rank(run, watched);
    for (int i = 0; i < watch.num_earlier_steps; ++i) {
      run_micro_batches(rank, run, i);
      rank.engine.after_optimizer_step();
    }
    if (is_watched) {
      events.clear();
      rank.model.in_block = [&](const Unit& unit) { events.push_back(unit.name); };
    }
    run_micro_batches(rank, run, 0);
    rank.engine.after_optimizer_step();
  });
  return events;
}

TEST(Order, UnderZero3TheNextUnitIsGatheredBeforeAUnitComputes) {
  const Events events = events_of_a_step({.plan = "zero3", .checkpointing = true, .num_micro_batches = 2});
  EXPECT_EQ(events, (Events{"all_gather", "all_gather",                                   // root, block 0
                            "all_gather", "block.0", "all_gather", "block.1", "block.2",  // forward
                            "all_gather", "all_gather", "block.2", "reduce",              // 2 again, 1; reduce 2
                            "all_gather", "block.1", "reduce", "block.0", "reduce",       // 0; reduce 1, 0
                            "reduce"}));                                                  // root
}

TEST(Order, ThroughSharedCopiesItIsTheSameWithoutAnythingMoreToWaitFor) {
  const ToyRun run{.plan = "zero3", .checkpointing = true, .num_micro_batches = 2};
  Events wanted = events_of_a_step(run);
  std::replace(wanted.begin(), wanted.end(), std::string("all_gather"),
               std::string("publish"));  // "mine is written"
  EXPECT_EQ(events_of_a_step(run, {.has_shared_memory = true}), wanted);
}

// Where it hides something: over a network. A node's own cores would only keep more memory busy.
TEST(Order, ASumIsWaitedForOneUnitLaterOnOneNodeAndTwoUnitsLaterOverANetwork) {
  for (const auto& [plan, sum] : {std::pair("zero3", "reduce"), std::pair("ddp", "all_reduce")}) {
    for (const bool is_network : {false, true}) {
      Events events = events_of_a_step({.plan = plan, .checkpointing = true, .num_micro_batches = 2},
                                       {.has_shared_memory = true, .sees_waits = true, .is_network = is_network});
      std::erase(events, "publish");
      events.erase(events.begin(), std::find(events.begin(), events.end(), "block.2") + 1);  // forward
      Events wanted = {"block.2", sum, "block.1", "done", sum, "block.0", "done", sum, "done", sum, "done"};
      if (is_network) wanted = {"block.2", sum, "block.1", sum, "block.0", "done", sum, "done", sum, "done", "done"};
      EXPECT_EQ(events, wanted) << plan << " " << is_network;
    }
  }
}

TEST(Order, UnderHsdpOnlyTheSumOverReplicasTravelsFar) {
  // Two replicas of one shard each: the sum over them is a unit's last communication, after nothing else.
  for (const bool is_network : {false, true}) {
    Events events = events_of_a_step({.plan = "hsdp", .checkpointing = true, .num_micro_batches = 4},
                                     {.has_shared_memory = true, .sees_waits = true, .is_network = is_network});
    std::erase(events, "publish");
    const auto last_round = std::find(events.rbegin(), events.rend(), "block.2");
    events.erase(events.begin(), last_round.base());
    Events wanted = {"all_reduce", "block.1",    "done", "all_reduce", "block.0",
                     "done",       "all_reduce", "done", "all_reduce", "done"};
    if (is_network)
      wanted = {"all_reduce", "block.1", "all_reduce", "block.0", "done",
                "all_reduce", "done",    "all_reduce", "done",    "done"};
    EXPECT_EQ(events, wanted) << is_network;
  }
}

TEST(Order, UnderDdpNothingIsSentBeforeTheLastRoundAndThenUnitByUnit) {
  // The gradients of block 2 leave while block 1 is recomputed.
  const Events events = events_of_a_step({.plan = "ddp", .checkpointing = true, .num_micro_batches = 4});
  EXPECT_EQ(events, (Events{"block.0", "block.1", "block.2", "block.2", "block.1", "block.0",  // first round
                            "block.0", "block.1", "block.2",                                   // second, forward
                            "block.2", "all_reduce", "block.1", "all_reduce", "block.0", "all_reduce", "all_reduce"}));
}

TEST(Order, WhereAnAllReduceDoesNotAddAsTheTreeDoesFinishedSlicesAreGatheredOneUnitLater) {
  // Ranges of three micro-batches are no subtrees: [0, 2), [2, 3), [3, 4), [4, 6).
  Events events = events_of_a_step({.plan = "ddp", .checkpointing = true, .num_micro_batches = 6});
  events.erase(events.begin(), std::find(events.begin(), events.end(), "reduce") - 1);
  EXPECT_EQ(events,
            (Events{"block.2", "reduce", "reduce", "block.1", "all_gather", "reduce", "reduce",  //
                    "block.0", "all_gather", "reduce", "reduce", "all_gather", "reduce", "reduce", "all_gather"}));
}

TEST(Order, Zero1SendsOnceAStepAndZero2EveryRound) {
  const auto count = [](const Events& events, const std::string& what) {
    return std::count(events.begin(), events.end(), what);
  };
  const Events once = events_of_a_step({.plan = "zero1", .num_micro_batches = 8});
  EXPECT_EQ(count(once, "reduce"), 4);
  EXPECT_EQ(count(once, "all_gather"), 0);  // new weights are gathered in the next step
  const Events often = events_of_a_step({.plan = "zero2", .num_micro_batches = 8});
  EXPECT_EQ(count(often, "reduce"), 16);
  EXPECT_EQ(count(often, "all_gather"), 0);
}

TEST(Order, UnderZero1NewWeightsAreGatheredDuringTheNextForwardPass) {
  const Events events = events_of_a_step({.plan = "zero1", .num_micro_batches = 2}, {.num_earlier_steps = 1});
  EXPECT_EQ(events, (Events{"all_gather", "all_gather", "all_gather", "block.0", "all_gather", "block.1", "block.2",
                            "reduce", "reduce", "reduce", "reduce"}));
}

TEST(Order, WeightsThatAreKeptAfterTheForwardPassAreGatheredOnce) {
  const auto gathers = [](const char* plan) {
    const Events events = events_of_a_step({.plan = plan, .num_micro_batches = 4});
    return std::count(events.begin(), events.end(), "all_gather");
  };
  EXPECT_EQ(gathers("zero3"), 1 + 2 * 2 * 3);
  EXPECT_EQ(gathers("zero3_kept"), 1 + 2 * 3);
}

}  // namespace
}  // namespace shardtune::toy
