#include "checkpoint/snapshot.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "core/error.hpp"

namespace shardtune {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t kCopiedAtOnce = std::size_t{256} << 10;  // a part of a second-level cache
constexpr const char* kCancelled = "the save was given up because the run ends";

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

Snapshot::Snapshot(StateView view, std::size_t staging_bytes)
    : view_(std::move(view)), staging_bytes_(std::max(staging_bytes, kPieceBytes)) {
  for (std::size_t i = 0; i < view_.slices.size(); ++i) {
    const at::Tensor& data = view_.slices[i].data;
    dtype_name(data.scalar_type());  // fp32 or bf16
    check_internal(data.is_contiguous() && data.device().is_cpu(),
                   "a saved slice must be a contiguous tensor on the CPU");
    const auto* address = static_cast<const char*>(data.data_ptr());
    for (std::size_t begin = 0; begin < data.nbytes(); begin += kPieceBytes) {
      Entry entry;
      entry.piece = {i, begin, std::min(kPieceBytes, data.nbytes() - begin)};
      entry.address = address + begin;
      total_bytes_ += entry.piece.size;
      entries_.push_back(std::move(entry));
    }
  }
  for (std::size_t i = 0; i < entries_.size(); ++i) by_address_.push_back(i);
  std::sort(by_address_.begin(), by_address_.end(),
            [&](std::size_t a, std::size_t b) { return entries_[a].address < entries_[b].address; });
  num_untaken_ = last_live_ = entries_.size();
}

void Snapshot::preserve(const at::Tensor& tensor) {
  std::unique_lock lock(mutex_);
  if (num_untaken_ == 0 || tensor.numel() == 0) return;
  const auto* begin = static_cast<const char*>(tensor.data_ptr());
  const char* end = begin + tensor.nbytes();
  auto it = std::partition_point(by_address_.begin(), by_address_.end(),
                                 [&](std::size_t i) { return entries_[i].address + entries_[i].piece.size <= begin; });
  for (; it != by_address_.end() && entries_[*it].address < end; ++it) preserve_entry(entries_[*it], lock);
}

void Snapshot::preserve_entry(Entry& entry, std::unique_lock<std::mutex>& lock) {
  const auto has_room = [&] { return staged_bytes_ == 0 || staged_bytes_ + entry.piece.size <= staging_bytes_; };
  if (entry.state == State::taking || (entry.state == State::live && !has_room())) {
    const auto start = Clock::now();
    wanted_ = &entry;
    changed_.wait(lock, [&] {
      return entry.state == State::taken || num_untaken_ == 0 || (entry.state == State::live && has_room());
    });
    wanted_ = nullptr;
    cost_.wait_seconds += seconds_since(start);
  }
  if (entry.state != State::live || num_untaken_ == 0) return;
  entry.state = State::copying;
  staged_bytes_ += entry.piece.size;
  cost_.most_staged_bytes = std::max<std::uint64_t>(cost_.most_staged_bytes, staged_bytes_);
  cost_.copied_bytes += entry.piece.size;
  lock.unlock();
  const auto start = Clock::now();
  AlignedBuffer copy = make_aligned_buffer(entry.piece.size);
  std::memcpy(copy.get(), entry.address, entry.piece.size);
  const double seconds = seconds_since(start);
  lock.lock();
  cost_.copy_seconds += seconds;
  entry.copy = std::move(copy);
  entry.state = State::staged;
  staged_.push_back(&entry);
  changed_.notify_all();
}

void Snapshot::cancel() {
  const std::lock_guard lock(mutex_);
  is_cancelled_ = true;
  changed_.notify_all();
}

void Snapshot::check_not_cancelled() const {
  const std::lock_guard lock(mutex_);
  if (is_cancelled_) fail(ErrorKind::io, kCancelled);
}

Snapshot::Cost Snapshot::cost() const {
  const std::lock_guard lock(mutex_);
  return cost_;
}

std::uint64_t Snapshot::taken_bytes() const {
  const std::lock_guard lock(mutex_);
  return taken_bytes_;
}

// What training waits for goes first, then what it has not changed yet: each such piece is one that need not be copied.
// Once training copies, it comes from the front, so the writer goes on from the back. Copies wait, as long as there is
// room for more of them.
Snapshot::Entry* Snapshot::choose() {
  if (wanted_ != nullptr && wanted_->state == State::live) return wanted_;
  Entry* live = nullptr;
  if (staged_bytes_ <= staging_bytes_ / 2) {
    while (first_live_ < last_live_ && entries_[first_live_].state != State::live) ++first_live_;
    while (first_live_ < last_live_ && entries_[last_live_ - 1].state != State::live) --last_live_;
    if (first_live_ < last_live_) live = &entries_[cost_.copied_bytes == 0 ? first_live_ : last_live_ - 1];
  }
  if (live != nullptr || staged_.empty()) return live;
  Entry* entry = staged_.back();
  staged_.pop_back();
  return entry;
}

Snapshot::Entry* Snapshot::choose_next(std::unique_lock<std::mutex>& lock) {
  Entry* chosen = nullptr;
  // Without a choice the training thread is copying the last pieces.
  changed_.wait(lock, [&] { return is_cancelled_ || num_untaken_ == 0 || (chosen = choose()) != nullptr; });
  if (is_cancelled_) fail(ErrorKind::io, kCancelled);
  return chosen;
}

std::optional<Snapshot::Piece> Snapshot::take(void* into, const Copied& copied) {
  std::unique_lock lock(mutex_);
  Entry* entry = choose_next(lock);
  if (entry == nullptr) return std::nullopt;
  const char* source = entry->copy ? entry->copy.get() : entry->address;
  entry->state = State::taking;
  lock.unlock();
  for (std::size_t begin = 0; begin < entry->piece.size; begin += kCopiedAtOnce) {
    const std::size_t size = std::min(kCopiedAtOnce, entry->piece.size - begin);
    std::memcpy(static_cast<char*>(into) + begin, source + begin, size);
    copied(entry->piece, begin, size);
  }
  lock.lock();
  if (entry->copy) {
    entry->copy.reset();
    staged_bytes_ -= entry->piece.size;
  }
  entry->state = State::taken;
  taken_bytes_ += entry->piece.size;
  --num_untaken_;
  changed_.notify_all();
  return entry->piece;
}

void Snapshot::abandon() {
  const std::lock_guard lock(mutex_);
  num_untaken_ = 0;
  for (Entry* entry : staged_) {
    entry->copy.reset();
    staged_bytes_ -= entry->piece.size;
  }
  staged_.clear();
  changed_.notify_all();
}

}  // namespace shardtune
