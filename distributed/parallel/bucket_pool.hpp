#pragma once
// Buffers for collectives, made once by Communicator::make_buffer and used again and again, and collectives that move
// more than one buffer holds.
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/memory_use.hpp"
#include "distributed/parallel/packed_pieces.hpp"

namespace shardtune {

inline constexpr std::int64_t kDefaultBucketBytes = 8 << 20;

// The buckets of one group. Not thread-safe. All ranks of the group must take and give back in the same order (as they
// call its collectives), because taking makes a bucket where none is free.
class BucketPool {
 public:
  struct Size {
    std::int64_t bucket_bytes;
    int max_in_flight;  // buckets that one collective may fill before it waits for the first
  };
  // `ranks` and `counter` outlive the pool.
  BucketPool(Communicator& ranks, ByteCounter& counter) : ranks_(ranks), counter_(counter) {}
  BucketPool(const BucketPool&) = delete;
  BucketPool& operator=(const BucketPool&) = delete;

  void set_size(Size size) noexcept { size_ = size; }  // before the first take()
  int max_in_flight() const noexcept { return size_.max_in_flight; }
  // Elements that a bucket has for each rank of the group, >= 1.
  std::int64_t numel_per_rank(at::ScalarType dtype) const noexcept;

  at::Tensor take();  // bytes; collective
  void give_back(at::Tensor bucket) { free_.push_back(std::move(bucket)); }
  std::int64_t bucket_bytes() const noexcept { return numel_per_rank(at::kByte) * ranks_.size(); }
  int num_made() const noexcept { return num_made_; }

 private:
  Communicator& ranks_;
  ByteCounter& counter_;
  Size size_{};
  std::deque<at::Tensor> free_;
  int num_made_ = 0;
};

// A group whose ranks each get a part of a sum.
struct ReductionAxis {
  Communicator& ranks;
  BucketPool& buckets;               // of `ranks`
  std::vector<std::int64_t> counts;  // elements that go to each rank
};

// One collective in chunks of a bucket each, several of them under way. Every member is collective over the pool's
// group.
class BucketStream {
 public:
  struct Steps {
    // Fills the bucket with this rank's share of chunk i and issues.
    std::function<Work(std::int64_t chunk, const at::Tensor& bucket)> start;
    // Takes the result of chunk i, which has completed. Chunks finish in order.
    std::function<void(std::int64_t chunk, const at::Tensor& bucket)> finish;
  };
  BucketStream(BucketPool& pool, std::int64_t num_chunks, Steps steps)
      : pool_(pool), num_chunks_(num_chunks), steps_(std::move(steps)) {}
  ~BucketStream() { drop(); }
  BucketStream(const BucketStream&) = delete;
  BucketStream& operator=(const BucketStream&) = delete;

  // As many chunks as may be under way at once.
  void start_some();
  // All of them; finishes the first ones as needed.
  void start_all();
  void finish();
  // Waits for what is under way (as ~Work does), drops it and starts nothing any more.
  void drop() noexcept;

 private:
  struct Flight {
    at::Tensor bucket;
    Work work;
  };
  void start_next();
  void finish_first();

  BucketPool& pool_;
  std::int64_t num_chunks_;
  std::int64_t next_chunk_ = 0;
  Steps steps_;
  std::deque<Flight> flights_;  // of the chunks before next_chunk_
};

// into = sum over `ranks` of what each has in `from`, which travels in `dtype`; not started yet. `from` has as many
// elements, or none: zeros. It may be `into` itself, and is let go when the last of it is in a bucket. `pool`: of
// `ranks`; both outlive the stream.
std::unique_ptr<BucketStream> all_reduce_stream(Communicator& ranks, BucketPool& pool, Pieces from, Pieces into,
                                                at::ScalarType dtype);

}  // namespace shardtune
