// What the engine does at its edges, what it refuses, and evaluation.
#include <atomic>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/parallel/toy_run.hpp"
#include "tests/parallel/wrapping_communicator.hpp"

namespace shardtune::toy {
namespace {

TEST(Evaluation, UnequalNumbersOfBatchesGiveThePlainLosses) {
  at::set_num_threads(1);
  constexpr std::int64_t kBatches = 5;
  Model plain(Frozen::positions);
  Tensors weights;
  for (Parameter* p : plain.parameters()) weights[p->name] = initial_weight(*p);
  set_plain_values(plain, weights, at::kFloat);
  PlainRunner plain_runner;
  std::vector<float> wanted;
  for (std::int64_t i = 0; i < kBatches; ++i)
    wanted.push_back(plain.loss(make_batch(0, i), plain_runner).item<float>());
  for (const std::string& plan : all_plans()) {
    for (const int ranks : {1, 2, 3, 4}) {
      const ToyRun run{.frozen = Frozen::positions, .plan = plan, .checkpointing = true, .num_ranks = ranks};
      std::atomic<int> num_losses = 0;
      run_thread_ranks(ranks, [&](Communicator& world) {
        at::set_num_threads(1);
        Rank rank(run, world);
        ParallelEngine& engine = rank.engine;
        const EvaluationScope scope(engine);
        for (std::int64_t round = 0; round < engine.num_rounds(kBatches); ++round) {
          const std::int64_t index = engine.micro_batch_of_round(kBatches, round);
          if (index < 0 && !engine.runs_every_round()) continue;
          const at::Tensor loss = rank.model.loss(make_batch(0, std::max<std::int64_t>(index, 0)), engine.runner());
          EXPECT_FALSE(loss.requires_grad());
          if (index < 0) continue;
          EXPECT_EQ(loss.item<float>(), wanted[static_cast<std::size_t>(index)]) << plan << " " << ranks;
          ++num_losses;
        }
      });
      EXPECT_EQ(num_losses, kBatches);
    }
  }
}

TEST(Engine, AUnitTheLossDoesNotDependOnHasZeroGradients) {
  for (const std::string& plan : all_plans()) {
    const ToyRun run{.plan = plan, .num_ranks = 2, .num_micro_batches = 3};
    run_thread_ranks(run.num_ranks, [&](Communicator& world) {
      at::set_num_threads(1);
      Rank rank(run, world);
      rank.model.use_last_block = false;
      run_micro_batches(rank, run, 0);
      int num_unused = 0;
      for (const ShardedParameter* p : rank.engine.trainable()) {
        const bool is_used = !p->parameter->name.starts_with("block.2");
        num_unused += is_used ? 0 : 1;
        if (p->gradient.numel() == 0) continue;
        EXPECT_EQ(p->gradient.abs().sum().item<float>() > 0, is_used) << p->parameter->name;
      }
      EXPECT_EQ(num_unused, 4);
    });
  }
}

// Their weights are gathered ahead, and no backward pass comes to give them back.
TEST(Engine, SeveralUnitsTheLossDoesNotDependOnLeaveRoomForTheOthers) {
  const auto gradients_under = [](const std::string& plan, bool has_shared_memory) {
    const ToyRun run{.num_blocks = 9, .plan = plan, .num_ranks = 2, .num_micro_batches = 3};
    double sum = 0.0;
    run_thread_ranks(run.num_ranks, [&](Communicator& inner) {
      at::set_num_threads(1);
      CommunicatorHooks hooks;
      hooks.has_shared_memory = has_shared_memory;
      WrappingCommunicator world(inner, hooks);
      Rank rank(run, world);
      rank.model.ignored_blocks = {2, 4, 6, 8};
      run_micro_batches(rank, run, 0);
      const double norm = rank.engine.grad_norm();
      if (world.rank() == 0) sum = norm;
    });
    return sum;
  };
  const double wanted = gradients_under("ddp", true);
  EXPECT_GT(wanted, 0.0);
  for (const std::string& plan : all_plans()) {
    for (const bool has_shared_memory : {true, false})
      EXPECT_EQ(gradients_under(plan, has_shared_memory), wanted) << plan << " " << has_shared_memory;
  }
}

TEST(Engine, OptimizerStateIsMadeWholeWhereMastersAre) {
  for (const std::string& plan : all_plans()) {
    const ToyRun run{.plan = plan, .num_ranks = 3};
    run_thread_ranks(run.num_ranks, [&](Communicator& world) {
      at::set_num_threads(1);
      Rank rank(run, world);
      for (const ShardedParameter* p : rank.engine.trainable()) {
        const at::Tensor state = at::full({p->master.numel()}, -1.0F);
        p->slice_of(state).fill_(static_cast<float>(world.rank()));
        rank.engine.gather_like_master(*p, state);
        for (int owner = 0; owner < world.size(); ++owner) {
          if (p->master.numel() != p->parameter->numel() && owner != world.rank()) continue;
          const at::Tensor part = state.narrow(0, p->layout.begin(owner) - p->master_offset, p->layout.size(owner));
          EXPECT_TRUE(at::equal(part, at::full_like(part, owner))) << p->parameter->name;
        }
      }
    });
  }
}

TEST(Engine, EveryWeightStartsOnA64ByteBoundaryAndIsALeafInTheComputeDtype) {
  for (const std::string& plan : all_plans()) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const auto world = make_self_communicator();
      Rank rank({.frozen = Frozen::positions, .plan = plan, .dtype = dtype}, *world);
      const EvaluationScope scope(rank.engine);
      for (const auto& unit : rank.engine.units()) {
        unit->unshard();
        for (const Parameter* p : unit->unit().parameters) {
          EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p->value.const_data_ptr()) % 64, 0U) << p->name;
          EXPECT_EQ(p->value.scalar_type(), dtype);
          EXPECT_TRUE(p->value.is_leaf());
          EXPECT_EQ(p->value.requires_grad(), p->is_trainable);
          EXPECT_TRUE(at::equal(p->value, initial_weight(*p).to(dtype))) << p->name;
        }
        unit->reshard();
      }
    }
  }
}

TEST(Engine, AbandonedStepLeavesNoTraceInTheNext) {
  const Tensors wanted = reference_gradients(Frozen::nothing, at::kFloat, 5);
  for (const std::string& plan : all_plans()) {
    const ToyRun run{.plan = plan, .num_ranks = 2, .num_micro_batches = 5};
    run_thread_ranks(run.num_ranks, [&](Communicator& world) {
      at::set_num_threads(1);
      Rank rank(run, world);
      rank.engine.begin_step(5);
      rank.engine.begin_micro_batch(0);
      rank.engine.backward(rank.model.loss(make_batch(9, 9), rank.engine.runner()));
      run_micro_batches(rank, run, 0);
      for (const ShardedParameter* p : rank.engine.trainable()) {
        const at::Tensor whole = wanted.at(p->parameter->name).reshape({-1});
        EXPECT_TRUE(at::equal(p->slice_of(p->gradient), whole.narrow(0, p->slice_offset(), p->slice_numel())));
      }
    });
  }
}

TEST(Engine, ScalingMultipliesEveryGradientAndTheNorm) {
  const ToyRun run{.plan = "zero3", .num_ranks = 3, .num_micro_batches = 2};
  run_thread_ranks(run.num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    Rank rank(run, world);
    run_micro_batches(rank, run, 0);
    const double norm = rank.engine.grad_norm();
    double wanted = 0.0;
    for (const auto& [name, gradient] : reference_gradients(run.frozen, run.dtype, 2)) {
      wanted += gradient.to(at::kDouble).square().sum().item<double>();
    }
    EXPECT_NEAR(norm, std::sqrt(wanted), 1e-12 * norm);
  });
}

TEST(Engine, EveryMicroBatchLeavesFromExactlyOneRank) {
  for (const std::string& plan : all_plans()) {
    std::atomic<int> num_leaves = 0;
    ToyRun run{.plan = plan, .num_ranks = 4, .num_micro_batches = 7};
    run.make_probe = [&](int) -> GradientProbe {
      return [&](const std::string& unit, const Pieces&) { num_leaves += unit == "root" ? 1 : 0; };
    };
    gradients(run);
    EXPECT_EQ(num_leaves, 7) << plan;
  }
}

ErrorKind kind_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.kind();
  }
  ADD_FAILURE() << "nothing was thrown";
  return ErrorKind::internal;
}

TEST(Engine, RefusesWhatItCannotHonour) {
  const auto world = make_self_communicator();
  Model frozen(Frozen::nothing);
  for (Parameter* p : frozen.parameters()) p->is_trainable = false;
  EXPECT_EQ(kind_of([&] { ParallelEngine(frozen.units(), *world, {.plan = find_sharding_plan("ddp")}); }),
            ErrorKind::config);
  Model model(Frozen::nothing);
  EXPECT_EQ(kind_of([&] {
              ParallelEngine(model.units(), *world, {.plan = find_sharding_plan("ddp"), .compute_dtype = at::kDouble});
            }),
            ErrorKind::config);
  EXPECT_EQ(kind_of([&] {
              ParallelEngine(model.units(), *world, {.plan = find_sharding_plan("hsdp"), .hsdp_shard_size = 2});
            }),
            ErrorKind::config);
}

TEST(Engine, CallsOutOfOrderAreOurBugAndSaySo) {
  const auto world = make_self_communicator();
  Rank rank({.plan = "zero3"}, *world);
  ParallelEngine& engine = rank.engine;
  EXPECT_EQ(kind_of([&] { engine.begin_micro_batch(0); }), ErrorKind::internal);
  EXPECT_EQ(kind_of([&] { engine.finish_step(); }), ErrorKind::internal);
  EXPECT_EQ(kind_of([&] { engine.grad_norm(); }), ErrorKind::internal);
  engine.begin_step(2);
  EXPECT_EQ(kind_of([&] { engine.begin_micro_batch(2); }), ErrorKind::internal);
  EXPECT_EQ(kind_of([&] { EvaluationScope scope(engine); }), ErrorKind::internal);
  engine.begin_micro_batch(0);
  EXPECT_EQ(kind_of([&] { engine.runner().run(*rank.model.units()[0], {}, {}); }), ErrorKind::internal);
  engine.backward(rank.model.loss(make_batch(0, 0), engine.runner()));
  EXPECT_EQ(kind_of([&] { engine.finish_step(); }), ErrorKind::internal) << "micro-batch 1 is missing";
}

TEST(Engine, AnErrorInsideARecomputedForwardKeepsItsKindAndFreesTheUnit) {
  const auto world = make_self_communicator();
  Rank rank({.plan = "zero3", .checkpointing = true}, *world);
  rank.engine.begin_step(1);
  rank.engine.begin_micro_batch(0);
  const at::Tensor loss = rank.model.loss(make_batch(0, 0), rank.engine.runner());
  rank.model.in_block = [](const Unit&) { fail(ErrorKind::numeric, "planted"); };
  EXPECT_EQ(kind_of([&] { rank.engine.backward(loss); }), ErrorKind::numeric);
  for (const Unit* unit : rank.model.units()) {
    EXPECT_EQ(storage_bytes(*unit), unit->is_root ? full_bytes(*unit) : 0) << unit->name;
  }
}

// Peers may never come to the gathers that an evaluation has issued ahead.
TEST(Engine, AnErrorInsideAnEvaluationIsNotHeldUpByGathers) {
  run_thread_ranks(2, [](Communicator& inner) {
    at::set_num_threads(1);
    bool is_failing = false;
    CommunicatorHooks hooks;
    hooks.has_shared_memory = false;
    hooks.after = [&](const std::string& operation, const at::Tensor&) {
      if (is_failing) fail(ErrorKind::comm, "waited for " + operation);
    };
    WrappingCommunicator world(inner, hooks);
    Rank rank({.plan = "zero3"}, world);
    rank.model.in_block = [&](const Unit& unit) {
      if (unit.name != "block.1") return;
      is_failing = true;
      fail(ErrorKind::numeric, "planted");
    };
    EXPECT_EQ(kind_of([&] {
                const EvaluationScope scope(rank.engine);
                rank.model.loss(make_batch(0, 0), rank.engine.runner());
              }),
              ErrorKind::numeric);
    EXPECT_TRUE(at::GradMode::is_enabled());
    is_failing = false;
  });
}

TEST(Engine, AUnitRunsOnlyOncePerMicroBatch) {
  const auto world = make_self_communicator();
  Rank rank({.plan = "ddp"}, *world);
  rank.engine.begin_step(1);
  rank.engine.begin_micro_batch(0);
  rank.model.loss(make_batch(0, 0), rank.engine.runner());
  EXPECT_EQ(kind_of([&] { rank.model.loss(make_batch(0, 0), rank.engine.runner()); }), ErrorKind::internal);
}

}  // namespace
}  // namespace shardtune::toy
