#pragma once
// Runs the toy model through the engine on thread ranks and puts the pieces of all ranks together.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/parallel_engine.hpp"
#include "tests/parallel/toy_model.hpp"

namespace shardtune::toy {

struct ToyRun {
  Frozen frozen = Frozen::nothing;
  int num_blocks = 3;
  std::string plan = "zero3";  // a plan's name, or "zero3_kept", "hsdp_kept": reshard_after_forward off
  at::ScalarType dtype = at::kFloat;
  bool checkpointing = false;       // full recomputation
  RecomputeOptions recompute = {};  // when not `checkpointing`
  int num_ranks = 1;
  std::int64_t num_micro_batches = 1;
  std::int64_t num_steps = 1;              // for train()
  double max_grad_norm = 0.0;              // for train()
  std::int64_t num_distinct_steps = 1000;  // train() repeats the batches after so many steps
  ReductionOrder reduction = ReductionOrder::tree;
  at::ScalarType reduce_dtype = at::kFloat;
  std::string share_frozen_on_host = {};
  std::int64_t bucket_bytes = kDefaultBucketBytes;
  at::ScalarType state_dtype = at::kFloat;  // of AdamW's moments
  bool is_network = false;                  // the ranks take each other for far away: see runs_on_own_cores()
  double loss_scale = 1.0;                  // a power of two; taken out again before the optimizer
  // Made on every rank; may return an empty probe.
  std::function<GradientProbe(int rank)> make_probe = {};
  std::string describe() const;
};

// Every plan and variant, as ToyRun::plan takes them. hsdp makes two replicas where the number of ranks is even.
std::vector<std::string> all_plans();
ParallelOptions parallel_options(const ToyRun& run, int num_ranks);

// A rank's model and engine with the initial weights loaded; only this rank's distinct slices are ever written.
struct Rank {
  Rank(const ToyRun& run, Communicator& world);
  Model model;
  ParallelEngine engine;
};

// One rank's part of the gradients of a step, up to finish_step().
void run_micro_batches(Rank& rank, const ToyRun& run, std::int64_t step);

// Called for every parameter concerned, with a tensor that is cut like the master.
using Sink = std::function<void(const ShardedParameter& parameter, const at::Tensor& like_master)>;
// Collective. The gradients of step 0.
void gradients_on_rank(const ToyRun& run, Communicator& world, const Sink& sink);
// Collective. The fp32 masters after num_steps of AdamW with clipping. Returns the gradient norm of the last step.
double train_on_rank(const ToyRun& run, Communicator& world, const Sink& sink);

// The same on thread ranks, assembled of the distinct slices. Under ddp every rank's whole gradient is compared, too.
Tensors gradients(const ToyRun& run);
Tensors train(const ToyRun& run, double* norm = nullptr);

// Empty when both hold the same names and bits, else what differs.
std::string difference(const Tensors& got, const Tensors& wanted);

}  // namespace shardtune::toy
