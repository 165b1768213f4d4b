#include "distributed/parallel/shared_copies.hpp"

#include "core/error.hpp"

namespace shardtune {

bool SharedCopies::make_class(std::int64_t bytes, int count) {
  if (!board_) board_ = ranks_.make_progress_board();
  if (!board_) return false;
  for (int i = 0; i < count; ++i) {
    at::Tensor memory = ranks_.make_shared(bytes, at::kByte);
    if (!memory.defined()) {
      for (const Copy& copy : copies_)
        counter_.subtract(static_cast<std::int64_t>(copy.memory.nbytes()) / ranks_.size());
      copies_.clear();
      return false;
    }
    counter_.add(bytes / ranks_.size());
    copies_.push_back({.copy_class = num_classes_, .memory = std::move(memory)});
  }
  ++num_classes_;
  return true;
}

std::size_t SharedCopies::take(int copy_class) {
  const Copy* oldest = nullptr;
  for (const Copy& copy : copies_) {
    if (copy.copy_class != copy_class || !copy.is_free) continue;
    if (oldest == nullptr || copy.released_before < oldest->released_before) oldest = &copy;
  }
  check_internal(oldest != nullptr, "SharedCopies: more units are gathered at once than the plan foresees");
  if (oldest->released_before >= num_completed_) {
    wait_until_filled(oldest->released_before < num_begun_ ? oldest->released_before : fill_done());
  }
  const auto index = static_cast<std::size_t>(oldest - copies_.data());
  copies_[index].is_free = false;
  return index;
}

void SharedCopies::release(std::size_t copy) noexcept {
  copies_[copy].is_free = true;
  copies_[copy].released_before = num_begun_;
}

std::int64_t SharedCopies::fill_done() {
  board_->publish(num_begun_ + 1);
  return num_begun_++;
}

void SharedCopies::wait_until_filled(std::int64_t number) {
  if (number < num_completed_) return;
  board_->wait_for_all(number + 1);
  num_completed_ = number + 1;
}

}  // namespace shardtune
