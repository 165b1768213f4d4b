#pragma once
// The state of one moment, stored by a writer thread while training goes on and changes it. Nothing is copied when a
// snapshot is taken: the writer reads the live tensors, and whoever is about to change one calls preserve() first,
// which copies what the writer has not taken yet (copy on update) into staging memory of bounded size.
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "checkpoint/direct_file.hpp"
#include "checkpoint/piece_source.hpp"
#include "checkpoint/state_view.hpp"

namespace shardtune {

class Snapshot : public PieceSource {
 public:
  // What it has cost the training thread so far.
  struct Cost {
    std::uint64_t copied_bytes = 0, most_staged_bytes = 0;
    double copy_seconds = 0, wait_seconds = 0;
  };

  // The tensors of `view` are contiguous, fp32 or bf16, on the CPU. At most `staging_bytes` are held in copies (one
  // piece at least, so that no size of it can block for ever).
  Snapshot(StateView view, std::size_t staging_bytes);
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  const StateView& view() const noexcept override { return view_; }

  // Training thread, before `tensor` (any tensor that shares memory with the snapshot, or none) is changed. Blocks only
  // while all staging memory is in use and the writer still needs a part of `tensor`.
  void preserve(const at::Tensor& tensor);
  // Training thread: the writer may stop early; take() and check_not_cancelled() throw from now on.
  void cancel();
  // Any thread.
  void check_not_cancelled() const;
  Cost cost() const;
  std::uint64_t total_bytes() const noexcept { return total_bytes_; }
  std::uint64_t taken_bytes() const;  // by the writer, so far

  // For the writer thread. After abandon() preserve() never blocks or copies.
  std::optional<Piece> take(void* into, const Copied& copied) override;
  void abandon() override;

 private:
  enum class State { live, copying, staged, taking, taken };
  struct Entry {
    Piece piece;
    const char* address = nullptr;  // in the live tensor
    State state = State::live;
    AlignedBuffer copy;
  };
  void preserve_entry(Entry& entry, std::unique_lock<std::mutex>& lock);
  Entry* choose();
  Entry* choose_next(std::unique_lock<std::mutex>& lock);

  const StateView view_;
  const std::size_t staging_bytes_;
  std::vector<Entry> entries_;  // in the order of the view; does not change
  std::vector<std::size_t> by_address_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Entry*> staged_;                  // waiting to be taken
  Entry* wanted_ = nullptr;                     // the training thread waits for this one
  std::size_t first_live_ = 0, last_live_ = 0;  // no entry before the first and from the last on is live
  std::size_t num_untaken_ = 0;
  std::size_t staged_bytes_ = 0;
  std::uint64_t total_bytes_ = 0, taken_bytes_ = 0;
  bool is_cancelled_ = false;
  Cost cost_;
};

}  // namespace shardtune
