#include "tests/parallel/toy_run.hpp"

#include <cstring>
#include <limits>
#include <mutex>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "distributed/comm/thread_group.hpp"
#include "distributed/parallel/gradient_norm.hpp"
#include "kernels/adamw.hpp"
#include "tests/parallel/wrapping_communicator.hpp"

namespace shardtune::toy {
namespace {

// Bits, not values: NaN equals NaN and -0 differs from +0.
bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

class Assembly {
 public:
  void put(const ShardedParameter& p, const at::Tensor& slice) {
    const std::lock_guard lock(mutex_);
    auto [found, is_new] = whole_.try_emplace(p.parameter->name);
    if (is_new) found->second = at::full(p.parameter->shape, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
    found->second.view({-1}).narrow(0, p.slice_offset(), p.slice_numel()).copy_(slice);
  }
  Tensors take() { return std::move(whole_); }

 private:
  std::mutex mutex_;
  Tensors whole_;
};

void optimizer_step(Rank& rank, const ToyRun& run, std::vector<AdamWSlice>& state, std::int64_t step, double norm) {
  const auto trainable = rank.engine.trainable();
  for (std::size_t i = 0; i < trainable.size(); ++i) {
    const ShardedParameter& p = *trainable[i];
    if (state.size() <= i) {
      const auto zeros = [&] { return at::zeros({p.master.numel()}, run.state_dtype); };
      state.push_back({p.master, zeros(), zeros(), {}, p.master_offset, p.compute_copy});
    }
    state[i].grad = p.gradient;
    adamw_step(state[i], {.lr = 1e-2,
                          .weight_decay = has_weight_decay(*p.parameter) ? 0.1 : 0.0,
                          .step = step + 1,
                          .rounding_key = i,
                          .grad_scale = clip_factor(norm, run.max_grad_norm) / run.loss_scale});
    state[i].grad.reset();
  }
}

ParallelOptions with_probe(ParallelOptions options, const ToyRun& run, int rank) {
  if (run.make_probe) options.probe = run.make_probe(rank);
  return options;
}

}  // namespace

std::string ToyRun::describe() const {
  const char* modes[] = {"kept", "recomputed", "selective"};
  return fmt::format("{} {} ranks {}{} V {} {} every {} frozen {}", plan, at::toString(dtype), num_ranks,
                     is_network ? " far away" : "", num_micro_batches,
                     modes[checkpointing ? 1 : static_cast<int>(recompute.mode)], recompute.every,
                     static_cast<int>(frozen));
}

std::vector<std::string> all_plans() { return {"ddp", "zero1", "zero2", "zero3", "zero3_kept", "hsdp", "hsdp_kept"}; }

ParallelOptions parallel_options(const ToyRun& run, int num_ranks) {
  PlanRequest request{.name = run.plan};
  if (request.name.ends_with("_kept")) {
    request.name.resize(request.name.size() - 5);
    request.reshard_after_forward = false;
  }
  if (request.name == "hsdp") request.hsdp_shard_size = num_ranks % 2 == 0 ? num_ranks / 2 : num_ranks;
  return {.plan = resolve_sharding_plan(request),
          .hsdp_shard_size = request.hsdp_shard_size,
          .compute_dtype = run.dtype,
          .reduction = run.reduction,
          .reduce_dtype = run.reduce_dtype,
          .bucket_bytes = run.bucket_bytes,
          .share_frozen_on_host = run.share_frozen_on_host,
          .recompute = run.checkpointing ? RecomputeOptions{.mode = RecomputeMode::full} : run.recompute};
}

Rank::Rank(const ToyRun& run, Communicator& world)
    : model(run.frozen, run.num_blocks),
      engine(model.units(), world, with_probe(parallel_options(run, world.size()), run, world.rank())) {
  for (ShardedParameter* p : engine.parameters()) {
    p->master.fill_(std::numeric_limits<float>::quiet_NaN());
    p->slice_of(p->master).copy_(
        initial_weight(*p->parameter).view({-1}).narrow(0, p->slice_offset(), p->slice_numel()));
  }
  engine.weights_loaded();
}

void run_micro_batches(Rank& rank, const ToyRun& run, std::int64_t step) {
  ParallelEngine& engine = rank.engine;
  engine.begin_step(run.num_micro_batches);
  for (std::int64_t round = 0; round < engine.num_rounds(run.num_micro_batches); ++round) {
    const std::int64_t index = engine.micro_batch_of_round(run.num_micro_batches, round);
    if (index < 0 && !engine.runs_every_round()) continue;
    engine.begin_micro_batch(round);
    constexpr std::int64_t kDummy = 1000;
    const at::Tensor loss = rank.model.loss(make_batch(step, index < 0 ? kDummy : index), engine.runner());
    engine.backward(run.loss_scale == 1.0 ? loss : loss * run.loss_scale);
  }
  engine.finish_step();
}

void gradients_on_rank(const ToyRun& run, Communicator& world, const Sink& sink) {
  at::set_num_threads(1);
  Rank rank(run, world);
  run_micro_batches(rank, run, 0);
  for (const ShardedParameter* p : rank.engine.trainable()) sink(*p, p->gradient);
}

double train_on_rank(const ToyRun& run, Communicator& world, const Sink& sink) {
  at::set_num_threads(1);
  Rank rank(run, world);
  std::vector<AdamWSlice> state;
  double norm = 0.0;
  for (std::int64_t step = 0; step < run.num_steps; ++step) {
    run_micro_batches(rank, run, step % run.num_distinct_steps);
    norm = rank.engine.grad_norm() / run.loss_scale;
    optimizer_step(rank, run, state, step, norm);
    rank.engine.after_optimizer_step();
  }
  for (const ShardedParameter* p : rank.engine.parameters()) sink(*p, p->master);
  return norm;
}

Tensors gradients(const ToyRun& run) {
  Assembly assembly;
  std::mutex mutex;
  std::map<int, Tensors> whole_of_rank;
  run_thread_ranks(run.num_ranks, [&](Communicator& threads) {
    WrappingCommunicator world(threads, {.is_network = run.is_network});
    Tensors whole;
    gradients_on_rank(run, world, [&](const ShardedParameter& p, const at::Tensor& gradient) {
      assembly.put(p, p.slice_of(gradient));
      if (run.plan == "ddp") whole[p.parameter->name] = gradient.clone().view(p.parameter->shape);
    });
    const std::lock_guard lock(mutex);
    whole_of_rank[world.rank()] = std::move(whole);
  });
  Tensors result = assembly.take();
  EXPECT_EQ(whole_of_rank.size(), static_cast<std::size_t>(run.num_ranks));
  if (run.plan == "ddp") {
    for (const auto& [rank, whole] : whole_of_rank) EXPECT_EQ(difference(whole, result), "") << "rank " << rank;
  }
  return result;
}

Tensors train(const ToyRun& run, double* norm) {
  Assembly assembly;
  std::mutex mutex;
  run_thread_ranks(run.num_ranks, [&](Communicator& threads) {
    WrappingCommunicator world(threads, {.is_network = run.is_network});
    const double last_norm = train_on_rank(
        run, world, [&](const ShardedParameter& p, const at::Tensor& master) { assembly.put(p, p.slice_of(master)); });
    const std::lock_guard lock(mutex);
    if (norm != nullptr) *norm = last_norm;
  });
  return assembly.take();
}

std::string difference(const Tensors& got, const Tensors& wanted) {
  std::string text;
  for (const auto& [name, tensor] : wanted) {
    const auto found = got.find(name);
    if (found == got.end()) {
      text += name + " is missing; ";
    } else if (!same_bits(found->second.contiguous(), tensor.contiguous())) {
      text += fmt::format("{} differs by up to {}; ", name, (found->second - tensor).abs().max().item<double>());
    }
  }
  if (got.size() != wanted.size()) text += fmt::format("{} tensors instead of {}", got.size(), wanted.size());
  return text;
}

}  // namespace shardtune::toy
