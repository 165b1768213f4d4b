#pragma once
// Memory that the ranks of one node share: POSIX shared memory with one part per rank. Internal to distributed/comm.
#include <cstdint>
#include <memory>
#include <string>

#include "distributed/comm/transport.hpp"

namespace shardtune {

// A mapping of all parts. Unmapped by the destructor; peers keep theirs. Its name is gone before anyone gets to see it,
// so nothing is left behind when processes die. Zero-filled. Destruction on any thread; else not thread-safe.
class SharedSegment {
 public:
  SharedSegment(std::byte* data, std::int64_t part_bytes, int num_parts);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  std::byte* part(int rank) const noexcept { return data_ + rank * part_bytes_; }
  std::int64_t part_bytes() const noexcept { return part_bytes_; }  // whole pages

 private:
  std::byte* data_;
  std::int64_t part_bytes_;
  int num_parts_;
};

struct SharedSegmentResult {
  std::shared_ptr<SharedSegment> segment;  // null when refused
  std::string refusal;                     // the same text on all ranks: what failed, where, what to do
};

// Collective over `group`, whose ranks must share a machine. Every byte is reserved here (posix_fallocate, each rank
// its own part), so that too little shared memory is a refusal and never a SIGBUS. Where one rank is refused all are.
// Error{comm} only when the group itself fails.
SharedSegmentResult make_shared_segment(Transport& group, std::int64_t part_bytes);

// Removes names that processes left behind by dying between making and removing them. Harmless to living ones.
void sweep_stale_segments() noexcept;

}  // namespace shardtune
