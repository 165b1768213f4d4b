#include "distributed/comm/shared_segment.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "core/file.hpp"

namespace shardtune {
namespace {

constexpr const char* kPrefix = "shardtune.";
constexpr const char* kDirectory = "/dev/shm";  // where Linux keeps the names
// Open MPI has a file there for every rank, of which it reserves nothing: filling the directory up would kill the ranks
// by SIGBUS at their next message. This is what such a file may grow to (btl_vader_segment_size).
constexpr std::int64_t kLeftPerRank = 4 << 20;
constexpr int kLeftForRanks = 4;  // at least: a group may be a part of the job

// What one rank tells the others. An empty error is success.
struct Message {
  std::array<char, 64> name{};
  std::array<char, 320> error{};

  void set_error(const std::string& text) { text.copy(error.data(), error.size() - 1); }
  bool is_ok() const { return error[0] == '\0'; }
};

std::string reason(const char* what, int code) {
  return fmt::format("{}: {}", what, std::generic_category().message(code));
}

// A new name with an open file of `bytes` bytes, none of them reserved yet. The file stays locked while it is open:
// that is how sweep_stale_segments() tells the living from the dead.
UniqueFd create(std::int64_t bytes, int num_ranks, Message& message) {
  struct statvfs space {};
  const std::int64_t left = kLeftPerRank * std::max(num_ranks, kLeftForRanks);
  // As many bytes as are free, where the size is limited at all.
  if (::statvfs(kDirectory, &space) == 0 && space.f_blocks > 0) {
    const auto free = static_cast<std::int64_t>(space.f_bavail * space.f_frsize);
    if (free < bytes + left) {
      message.set_error(fmt::format("only {} are free, {} of which are left to others", free, left));
      return {};
    }
  }
  for (int attempt = 0; attempt < 100; ++attempt) {
    const auto ticks = std::chrono::steady_clock::now().time_since_epoch().count();
    const std::string name = fmt::format("/{}{}.{:x}", kPrefix, ::getpid(), ticks);
    UniqueFd file(::shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
    if (!file && errno == EEXIST) continue;
    if (!file) {
      message.set_error(reason("shm_open", errno));
      return {};
    }
    name.copy(message.name.data(), message.name.size() - 1);
    struct stat status {};
    const bool is_locked = ::flock(file.get(), LOCK_EX | LOCK_NB) == 0;
    if (!is_locked || ::fstat(file.get(), &status) != 0 || status.st_nlink == 0) continue;  // swept in between
    if (::ftruncate(file.get(), bytes) != 0) {
      message.set_error(reason("ftruncate", errno));
      (void)::shm_unlink(name.c_str());
      return {};
    }
    return file;
  }
  message.set_error("no free name for a shared segment");
  return {};
}

std::byte* map_part(const UniqueFd& file, std::int64_t part_bytes, int rank, int size, Message& message) {
  // With a file-size limit the kernel sends SIGXFSZ instead; the launcher may choose to ignore that signal.
  // A signal that is handled interrupts it.
  int code = EINTR;
  while (code == EINTR) code = ::posix_fallocate(file.get(), rank * part_bytes, part_bytes);
  if (code != 0) {
    message.set_error(reason("posix_fallocate", code));
    return nullptr;
  }
  void* data =
      ::mmap(nullptr, static_cast<std::size_t>(part_bytes * size), PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) {
    message.set_error(reason("mmap", errno));
    return nullptr;
  }
  return static_cast<std::byte*>(data);
}

template <class T>
std::byte* bytes_of(T& value) {
  return reinterpret_cast<std::byte*>(&value);
}

}  // namespace

SharedSegment::SharedSegment(std::byte* data, std::int64_t part_bytes, int num_parts)
    : data_(data), part_bytes_(part_bytes), num_parts_(num_parts) {}

SharedSegment::~SharedSegment() { (void)::munmap(data_, static_cast<std::size_t>(part_bytes_ * num_parts_)); }

SharedSegmentResult make_shared_segment(Transport& group, std::int64_t part_bytes) {
  const std::int64_t page = ::sysconf(_SC_PAGESIZE);
  part_bytes = (part_bytes + page - 1) / page * page;
  Message made;
  UniqueFd file;
  if (group.rank() == 0) {
    sweep_stale_segments();
    file = create(part_bytes * group.size(), group.size(), made);
  }
  group.broadcast(bytes_of(made), sizeof made, 0);

  std::byte* data = nullptr;
  std::vector<Message> messages(static_cast<std::size_t>(group.size()));
  Message& mine = messages[static_cast<std::size_t>(group.rank())];
  mine = made;
  if (made.is_ok()) {
    if (group.rank() != 0) file = UniqueFd(::shm_open(made.name.data(), O_RDWR, 0));
    if (!file) {
      mine.set_error(reason("shm_open of a segment made by another rank", errno));
    } else {
      data = map_part(file, part_bytes, group.rank(), group.size(), mine);
    }
  }
  const std::vector<std::int64_t> counts(messages.size(), sizeof(Message));
  group.all_gather(bytes_of(mine), bytes_of(messages.front()), counts);
  // All have it open now, or never will.
  if (group.rank() == 0 && file) (void)::shm_unlink(made.name.data());
  SharedSegmentResult result;
  if (data != nullptr) result.segment = std::make_shared<SharedSegment>(data, part_bytes, group.size());
  for (std::size_t r = 0; r < messages.size(); ++r) {
    if (messages[r].is_ok()) continue;
    result.segment.reset();
    result.refusal = fmt::format("{} bytes of shared memory in {} for {} ranks are refused on rank {} of them: {}",
                                 part_bytes * group.size(), kDirectory, group.size(), r, messages[r].error.data());
    break;
  }
  return result;
}

void sweep_stale_segments() noexcept {
  try {
    for (const auto& entry : std::filesystem::directory_iterator(kDirectory)) {
      const std::string name = entry.path().filename().string();
      if (!name.starts_with(kPrefix)) continue;
      const UniqueFd file(::shm_open(("/" + name).c_str(), O_RDWR, 0));
      if (file && ::flock(file.get(), LOCK_EX | LOCK_NB) == 0) (void)::shm_unlink(("/" + name).c_str());
    }
  } catch (const std::exception&) {
    // No such directory, or a name that went away meanwhile: nothing to sweep.
  }
}

}  // namespace shardtune
