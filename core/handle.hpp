#pragma once
// RAII for C handles (MPI_Comm, hid_t, file descriptors). Move-only; not thread-safe.
#include <utility>

namespace shardtune {

// Traits: `static T null() noexcept` and `static void destroy(T) noexcept` (called once per owned non-null handle).
// destroy must not throw; where closing can fail and that matters (files!), close explicitly through release().
template <class T, class Traits>
class UniqueHandle {
 public:
  UniqueHandle() noexcept : value_(Traits::null()) {}
  explicit UniqueHandle(T value) noexcept : value_(value) {}
  UniqueHandle(UniqueHandle&& other) noexcept : value_(std::exchange(other.value_, Traits::null())) {}
  UniqueHandle& operator=(UniqueHandle&& other) noexcept {
    if (this != &other) reset(std::exchange(other.value_, Traits::null()));
    return *this;
  }
  UniqueHandle(const UniqueHandle&) = delete;
  UniqueHandle& operator=(const UniqueHandle&) = delete;
  ~UniqueHandle() { reset(Traits::null()); }

  T get() const noexcept { return value_; }
  explicit operator bool() const noexcept { return value_ != Traits::null(); }
  T release() noexcept { return std::exchange(value_, Traits::null()); }
  void reset(T value) noexcept {
    T old = std::exchange(value_, value);
    if (old != Traits::null()) Traits::destroy(old);
  }

 private:
  T value_;
};

}  // namespace shardtune
