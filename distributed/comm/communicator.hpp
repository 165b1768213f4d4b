#pragma once
// Collectives between the ranks of one group. Semantics first:
// - Collective calls: every rank of the group calls the same operations in the same order with matching arguments.
// - Tensors are contiguous, on the CPU, dtype fp32, fp64, bf16, int64 or uint8 (sums: fp32, fp64, bf16, int64).
//   A tensor handed over must not be read or written by the caller until the returned Work has been waited for;
//   the Work keeps it alive.
// - Sums are taken in a fixed binary tree over the ranks, in fp32 for bf16 tensors (rounded once at the end): every
//   backend gives the same bits, and every rank gets the same bits.
// - A Communicator belongs to one thread at a time.
// - Errors: Error{comm}; after one the Communicator is unusable and the job should end.
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

namespace shardtune {

enum class ReduceOp { sum, max, min };

// A running collective. Move-only; wait() blocks until the result is in place and rethrows the operation's error.
// Destroying an unwaited Work waits (a collective cannot be taken back) and swallows the error after logging it; while an
// exception is in flight it does not wait, because peers may never come (the operation itself keeps its tensors).
class Work {
 public:
  Work() = default;  // already complete
  explicit Work(std::function<void()> wait) : wait_(std::move(wait)) {}
  Work(Work&& other) noexcept : wait_(std::exchange(other.wait_, nullptr)) {}
  Work& operator=(Work&& other) noexcept;
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  ~Work();
  void wait();

 private:
  std::function<void()> wait_;
};

// How far each rank of a group has come, for the others to wait for: beside the group's collectives, not behind those
// under way. Belongs to one thread at a time, which need not be the Communicator's, and may outlive the group. Nothing
// compares what ranks do here: one that does not come is noticed by the timeout, or when it ends.
class ProgressBoard {
 public:
  virtual ~ProgressBoard() = default;
  // Local. This rank has come to `step`: more than before (all begin at 0), less than 2^31 beyond what others wait for.
  // What it has written into memory of make_shared() is seen by whoever has waited for the step.
  virtual void publish(std::int64_t step) = 0;
  // Blocks until every rank has come to `step`, which this one has published, or beyond. Error{comm} like a
  // collective's.
  virtual void wait_for_all(std::int64_t step) = 0;
};

class Communicator {
 public:
  using Counts = std::span<const std::int64_t>;  // elements per rank, size() entries; zeros are fine

  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // True: operations are work of these ranks' own cores (all are on one node), so that having more of them under way
  // hides nothing. False: a network does most of it meanwhile. The same on all ranks.
  virtual bool runs_on_own_cores() const = 0;

  // tensor := reduction over ranks, in place, same bits on all ranks.
  [[nodiscard]] virtual Work all_reduce(at::Tensor tensor, ReduceOp op) = 0;
  // out := concatenation of every rank's `in`; counts[r] = in.numel() on rank r; out.numel() = sum of counts.
  [[nodiscard]] virtual Work all_gather(at::Tensor out, at::Tensor in, Counts counts) = 0;
  // out := this rank's part of the sum over ranks of `in`; counts[r] elements belong to rank r; in.numel() = sum of counts.
  [[nodiscard]] virtual Work reduce_scatter(at::Tensor out, at::Tensor in, Counts counts) = 0;
  // Part r of `in` (in_counts[r] elements) goes to rank r; `out` receives out_counts[r] elements from rank r, in rank order.
  [[nodiscard]] virtual Work all_to_all(at::Tensor out, Counts out_counts, at::Tensor in, Counts in_counts) = 0;
  [[nodiscard]] virtual Work broadcast(at::Tensor tensor, int root) = 0;
  virtual void barrier() = 0;  // blocks
  // Collective, blocks: an uninitialised tensor of `numel` elements, the same number on every rank, in memory that this
  // group's collectives work on without copies where the backend knows such memory (ranks of one node); elsewhere an
  // ordinary tensor, as here. Only speed depends on it. Made to be kept: one costs as much as many collectives.
  virtual at::Tensor make_buffer(std::int64_t numel, at::ScalarType dtype);
  // Collective, blocks: one uninitialised tensor that all ranks of this group have in common, where the backend knows
  // such memory (ranks of one node); elsewhere undefined, on every rank. What a rank writes into it the others see once
  // a collective of this group that the writer called afterwards has completed on them, or by a ProgressBoard; who
  // overwrites what others read must know that they are done. It may outlive the group.
  virtual at::Tensor make_shared(std::int64_t numel, at::ScalarType dtype);
  // Collective, blocks. Null, on every rank, where make_shared() gives nothing.
  virtual std::unique_ptr<ProgressBoard> make_progress_board();
  // Collective. Ranks of one colour form a group, ordered by (key, rank). Colours are >= 0.
  virtual std::unique_ptr<Communicator> split(int color, int key) = 0;
};

// A rank alone: every operation is the identity.
std::unique_ptr<Communicator> make_self_communicator();

}  // namespace shardtune
