#include "core/file.hpp"

#include <cerrno>
#include <cstring>
#include <system_error>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

[[noreturn]] void fail_errno(ErrorKind kind, const char* action, const std::filesystem::path& file) {
  fail(kind, fmt::format("cannot {} {}: {}", action, file.string(), std::strerror(errno)));
}

bool is_absent(int code) { return code == ENOENT || code == ENOTDIR || code == ENAMETOOLONG; }

// 0, or the error of what could not be made.
int make_missing(const std::filesystem::path& directory) {
  std::error_code ignored;
  if (std::filesystem::is_directory(directory, ignored)) return 0;
  const std::filesystem::path parent = directory.parent_path();
  if (!parent.empty() && parent != directory)
    if (const int code = make_missing(parent)) return code;
  if (::mkdir(directory.c_str(), 0777) != 0) {
    const int code = errno;
    // There now: another process was faster, or the path ends with a slash.
    return code == EEXIST && std::filesystem::is_directory(directory, ignored) ? 0 : code;
  }
  fsync_parent(directory);
  return 0;
}

}  // namespace

void check_output_is_other(const std::string& output, const std::string& input) {
  std::error_code unknown;
  if (std::filesystem::equivalent(output, input, unknown))
    fail(ErrorKind::config, fmt::format("--output = {}: this is the input itself; choose another file", output));
}

const char* write_advice(int code) {
  switch (code) {
    case ENOSPC:
    case EDQUOT: return " (free some space there or choose another directory)";
    case EACCES:
    case EROFS:
    case EPERM: return " (choose a directory that this user may write to)";
    default: return "";
  }
}

void fail_writing(const char* action, const std::filesystem::path& file, int code) {
  fail(ErrorKind::io,
       fmt::format("cannot {} {}: {}{}", action, file.string(), std::strerror(code), write_advice(code)));
}

UniqueFd open_for_reading(const std::filesystem::path& file) {
  UniqueFd fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) fail_errno(is_absent(errno) ? ErrorKind::data : ErrorKind::io, "open", file);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) fail_errno(ErrorKind::io, "examine", file);
  if (S_ISDIR(info.st_mode)) fail(ErrorKind::data, fmt::format("{} is a directory, a file is needed", file.string()));
  return fd;
}

std::uint64_t file_size(int fd, const std::filesystem::path& file) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) fail_errno(ErrorKind::io, "examine", file);
  return static_cast<std::uint64_t>(info.st_size);
}

void pread_exactly(int fd, void* into, std::size_t size, std::uint64_t offset, const std::filesystem::path& file) {
  auto* bytes = static_cast<char*>(into);
  while (size > 0) {
    const ssize_t got = ::pread(fd, bytes, std::min<std::size_t>(size, 1U << 30), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_errno(ErrorKind::io, "read", file);
    if (got == 0)
      fail(ErrorKind::data, fmt::format("{} ends {} bytes too early (at byte {}); it was truncated, fetch it again",
                                        file.string(), size, offset));
    bytes += got;
    size -= static_cast<std::size_t>(got);
    offset += static_cast<std::uint64_t>(got);
  }
}

std::string read_file(const std::filesystem::path& file, std::size_t max_bytes) {
  const UniqueFd fd = open_for_reading(file);
  const std::uint64_t size = file_size(fd.get(), file);
  if (size > max_bytes)
    fail(ErrorKind::data, fmt::format("{} has {} bytes, more than the limit of {}", file.string(), size, max_bytes));
  std::string text(size, '\0');
  pread_exactly(fd.get(), text.data(), size, 0, file);
  return text;
}

void write_all(int fd, std::string_view bytes, const std::filesystem::path& file) {
  while (!bytes.empty()) {
    const ssize_t put = ::write(fd, bytes.data(), std::min<std::size_t>(bytes.size(), 1U << 30));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail_writing("write", file, errno);
    bytes.remove_prefix(static_cast<std::size_t>(put));
  }
}

void write_file_durably(const std::filesystem::path& file, std::string_view bytes) {
  const std::filesystem::path temporary = file.string() + ".tmp";
  UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!fd) fail_writing("create", temporary, errno);
  write_all(fd.get(), bytes, temporary);
  if (::fsync(fd.get()) != 0) fail_writing("sync", temporary, errno);
  if (::close(fd.release()) != 0) fail_writing("close", temporary, errno);
  rename_path(temporary, file);
  fsync_parent(file);
}

void fsync_path(const std::filesystem::path& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) fail_errno(ErrorKind::io, "open", path);
  if (::fsync(fd.get()) != 0) fail_writing("sync", path, errno);
}

void fsync_parent(const std::filesystem::path& path) {
  fsync_path(path.has_parent_path() ? path.parent_path() : std::filesystem::path("."));
}

void rename_path(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_writing("rename to", to, errno);
}

void make_directories_durably(const std::filesystem::path& directory) {
  // Something else may stand where one of the upper ones has to be.
  if (const int code = make_missing(directory)) fail_writing("create", directory, code == EEXIST ? ENOTDIR : code);
}

}  // namespace shardtune
