#pragma once
// One implementation of the collectives under measurement.
#include <cstdint>
#include <memory>
#include <string>

#include <ATen/core/Tensor.h>

#include "distributed/comm/communicator.hpp"

namespace shardtune::benchmark {

enum class Operation { all_reduce, reduce_scatter, all_gather, all_to_all };

struct Case {
  Operation operation;
  at::ScalarType dtype;
  // Of the whole vector on each rank: what is reduced, scattered, gathered or exchanged. A multiple of all ranks'
  // elements.
  std::int64_t numel;
};

// All functions are collective. Where a case is in place (all_reduce), in() and out() are the same tensor.
class Contestant {
 public:
  virtual ~Contestant() = default;
  virtual std::string name() const = 0;
  virtual void prepare(const Case& c) = 0;
  virtual void run() = 0;
  const at::Tensor& in() const { return in_; }
  const at::Tensor& out() const { return out_; }

 protected:
  // Ordinary tensors for c.
  void allocate(const Case& c, int num_ranks);

  at::Tensor in_;
  at::Tensor out_;
};

// Elements per rank of the tensors of a case.
std::int64_t in_numel(const Case& c, int num_ranks);
std::int64_t out_numel(const Case& c, int num_ranks);

struct OwnOptions {
  bool in_buffers = false;  // tensors from make_buffer()
  bool is_direct = false;   // called on this thread, as MPI is, and not handed to the communication thread
};
// `world`, of several ranks, must outlive it.
std::unique_ptr<Contestant> make_own_contestant(Communicator& world, const OwnOptions& options, std::int64_t max_bytes);
// MPI's own collectives, called on the calling thread while the communicator of shardtune has nothing to do.
std::unique_ptr<Contestant> make_mpi_contestant(int num_ranks);
// The rank's ProcessGroupGloo out of LibTorch, over loopback; `file` is where the ranks meet, new for each run.
std::unique_ptr<Contestant> make_gloo_contestant(int rank, int num_ranks, const std::string& file);

}  // namespace shardtune::benchmark
