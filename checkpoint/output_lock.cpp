#include "checkpoint/output_lock.hpp"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>
#include <thread>

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include "core/error.hpp"
#include "core/host.hpp"
#include "core/log.hpp"

namespace shardtune {
namespace {

constexpr const char* kLockFile = "shardtune.lock";

enum class Attempt { taken, busy, unsupported };

Attempt try_lock(int fd, int operation) {
  while (true) {
    if (::flock(fd, operation | LOCK_NB) == 0) return Attempt::taken;
    if (errno == EINTR) continue;
    return errno == EWOULDBLOCK ? Attempt::busy : Attempt::unsupported;
  }
}

std::string describe_self(const std::string& purpose) {
  return fmt::format("{}, process {} on {}, since {:%Y-%m-%d %H:%M:%S}", purpose, ::getpid(), host_name(),
                     fmt::localtime(std::time(nullptr)));
}

}  // namespace

OutputLock::OutputLock(const std::filesystem::path& output_dir, const std::string& purpose, double patience_seconds) {
  const std::filesystem::path file = output_dir / kLockFile;
  fd_ = UniqueFd(::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!fd_) fail_writing("open", file, errno);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(patience_seconds);
  Attempt attempt = Attempt::busy;
  while ((attempt = try_lock(fd_.get(), LOCK_EX)) == Attempt::busy && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  if (attempt == Attempt::busy) {
    std::string holder = read_file(file, 4096);
    while (!holder.empty() && holder.back() == '\n') holder.pop_back();
    fail(ErrorKind::config,
         fmt::format("{} is in use by another job ({}); wait for its end or choose another --output_dir",
                     output_dir.string(), holder));
  }
  if (attempt == Attempt::unsupported)
    log::warn("{} cannot be locked ({}); make sure that no second job uses this directory", file.string(),
              std::strerror(errno));
  const std::string text = describe_self(purpose) + "\n";
  if (::ftruncate(fd_.get(), 0) == 0) [[maybe_unused]]
    const auto put = ::pwrite(fd_.get(), text.data(), text.size(), 0);
}

UniqueFd lock_for_reading(const std::filesystem::path& checkpoint_dir) {
  UniqueFd fd(::open((checkpoint_dir / "manifest.json").c_str(), O_RDONLY | O_CLOEXEC));
  // Whoever holds it alone deletes the checkpoint, which the reader then finds out by itself.
  if (fd && try_lock(fd.get(), LOCK_SH) != Attempt::taken) fd.reset(FdTraits::null());
  return fd;
}

std::optional<UniqueFd> lock_for_deleting(const std::filesystem::path& checkpoint_dir) {
  UniqueFd fd(::open((checkpoint_dir / "manifest.json").c_str(), O_RDONLY | O_CLOEXEC));
  if (fd && try_lock(fd.get(), LOCK_EX) == Attempt::busy) return std::nullopt;
  return fd;
}

}  // namespace shardtune
