#include "checkpoint/direct_file.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/error.hpp"
#include "core/log.hpp"

namespace shardtune {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = std::size_t{2} << 20;

constexpr std::uint64_t kWorthIt = std::uint64_t{1} << 20;  // smaller files push out little and are often read again

std::size_t round_up(std::size_t size, std::size_t unit) { return (size + unit - 1) / unit * unit; }

// 0, or the error; EINTR and short writes are continued.
int write_at(int fd, const char* bytes, std::size_t size, std::uint64_t position) {
  while (size > 0) {
    const ssize_t put = ::pwrite(fd, bytes, size, static_cast<off_t>(position));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno;
    bytes += put;
    size -= static_cast<std::size_t>(put);
    position += static_cast<std::uint64_t>(put);
  }
  return 0;
}

// Slower, not wrong; a process says it once, not for every file of every save.
enum class Access { reads, writes };
void say_once(Access access, const std::filesystem::path& file, int code) {
  static std::atomic_flag was_said[2];
  const bool is_read = access == Access::reads;
  if (!was_said[is_read].test_and_set())
    log::info("{}: direct {} are refused there ({}), the page cache is used for this and all such files", file.string(),
              is_read ? "reads" : "writes", std::strerror(code));
}

}  // namespace

DirectFile::DirectFile(std::filesystem::path file) : file_(std::move(file)) {
  cached_ = UniqueFd(::open(file_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!cached_) fail_writing("create", file_, errno);
  direct_ = UniqueFd(::open(file_.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC));
  if (!direct_) say_once(Access::writes, file_, errno);
}

void DirectFile::write(const void* data, std::size_t size, std::uint64_t position) {
  const auto* bytes = static_cast<const char*>(data);
  if (direct_ && size >= kPage && position % kPage == 0 && reinterpret_cast<std::uintptr_t>(bytes) % kPage == 0) {
    const std::size_t whole = size / kPage * kPage;
    // After a short direct write the rest may be unaligned, which is EINVAL as well: all of it is written again.
    const int code = write_at(direct_.get(), bytes, whole, position);
    if (code == EINVAL) {
      say_once(Access::writes, file_, code);
      direct_.reset(FdTraits::null());
    } else if (code != 0) {
      fail_writing("write", file_, code);
    } else {
      bytes += whole, size -= whole, position += whole;
    }
  }
  if (const int code = write_at(cached_.get(), bytes, size, position); code != 0) fail_writing("write", file_, code);
}

void DirectFile::sync() {
  if (::fsync(cached_.get()) != 0) fail_writing("sync", file_, errno);
}

void AlignedDelete::operator()(char* bytes) const noexcept { std::free(bytes); }

AlignedBuffer make_aligned_buffer(std::size_t size) {
  const std::size_t unit = size < kHugePage ? kPage : kHugePage, held = round_up(size, unit);
  AlignedBuffer buffer(static_cast<char*>(std::aligned_alloc(unit, held)));
  if (!buffer) throw std::bad_alloc();
  if (unit == kHugePage) ::madvise(buffer.get(), held, MADV_HUGEPAGE);  // a hint: kernels without them refuse it
  return buffer;
}

DirectReader::DirectReader(std::filesystem::path file)
    : file_(std::move(file)), cached_(open_for_reading(file_)), file_bytes_(file_size(cached_.get(), file_)) {
  if (file_bytes_ < kWorthIt) return;
  direct_ = UniqueFd(::open(file_.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
  if (!direct_) say_once(Access::reads, file_, errno);
}

void DirectReader::read(char* into, std::size_t size, std::uint64_t position) {
  std::size_t done = 0;
  while (direct_ && done < size) {
    const ssize_t got =
        ::pread(direct_.get(), into + done, round_up(size - done, kPage), static_cast<off_t>(position + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) say_once(Access::reads, file_, errno);
    if (got <= 0) break;
    done += static_cast<std::size_t>(got);
    if (done % kPage != 0) break;  // the end of the file
  }
  // Where direct reads are refused after all, and at an end that comes too early: the other way, which knows the
  // errors.
  if (done < size) pread_exactly(cached_.get(), into + done, size - done, position + done, file_);
}

}  // namespace shardtune
