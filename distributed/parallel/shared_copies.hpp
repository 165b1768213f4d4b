#pragma once
// Memory for gathered weights that the ranks of a group have in common: every rank casts its own part straight into it
// and computes with the whole. One copy per node, and nothing to unpack.
//
// Note [When a copy may be overwritten]
// A rank that has called fill_done() has, before that in its program, released what it released. So when a fill_done()
// has completed on all ranks, everything released before it is free on all of them, without a message of its own. With
// three copies for two in use (the running unit's and the next one's) this costs no waiting.
//
// Note [Why copies have a progress board]
// "Written" must not queue behind gradients on their way to other machines (or delayed by them): the next unit would
// wait for both.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/memory_use.hpp"

namespace shardtune {

// Not thread-safe. All ranks of the group must make the same calls in the same order.
class SharedCopies {
 public:
  // `ranks` and `counter` (which counts a rank's share) outlive this.
  SharedCopies(Communicator& ranks, ByteCounter& counter) : ranks_(ranks), counter_(counter) {}
  SharedCopies(const SharedCopies&) = delete;
  SharedCopies& operator=(const SharedCopies&) = delete;

  // Collective: makes `count` copies of `bytes` each, a class of their own. False on every rank where the backend has
  // no such memory; nothing else may be called then.
  bool make_class(std::int64_t bytes, int count);

  // Collective. A copy of the class that no rank uses any more, as an index.
  std::size_t take(int copy_class);
  const at::Tensor& memory(std::size_t copy) const { return copies_[copy].memory; }  // bytes
  // Local: this rank does not read the copy any more.
  void release(std::size_t copy) noexcept;

  // Local, but in the same order on all ranks. To be called when this rank's part of a copy is written;
  // wait_until_filled() with the number returned blocks until all parts are.
  std::int64_t fill_done();
  void wait_until_filled(std::int64_t number);

 private:
  struct Copy {
    int copy_class;
    at::Tensor memory;
    bool is_free = true;
    std::int64_t released_before = -1;  // a fill_done() with this or a higher number says that all ranks have released
  };
  Communicator& ranks_;
  ByteCounter& counter_;
  std::vector<Copy> copies_;
  int num_classes_ = 0;
  std::unique_ptr<ProgressBoard> board_;  // steps: fill_done() calls
  std::int64_t num_begun_ = 0;
  std::int64_t num_completed_ = 0;  // as far as this rank has waited
};

}  // namespace shardtune
