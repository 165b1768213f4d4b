#include <exception>
#include <utility>

#include "core/log.hpp"
#include "distributed/comm/communicator.hpp"

namespace shardtune {

Work& Work::operator=(Work&& other) noexcept {
  if (this != &other) {
    Work finished(std::move(*this));  // waits for what this object held
    wait_ = std::exchange(other.wait_, nullptr);
  }
  return *this;
}

Work::~Work() {
  if (!wait_ || std::uncaught_exceptions() > 0) return;
  try {
    wait();
  } catch (const std::exception& e) {
    log::all_ranks::error("a collective that nobody waited for failed: {}", e.what());
  }
}

void Work::wait() {
  if (auto wait = std::exchange(wait_, nullptr)) wait();
}

}  // namespace shardtune
