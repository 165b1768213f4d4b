#pragma once
// Files with honest errors. A file that is missing or ends too early is Error{data}; one that the system refuses to
// open or to read (permissions, a failing disk, too many open files), which says nothing of what it holds, and failing
// to write are Error{io}. Messages name the path and the system's reason. All functions are thread-safe.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include <unistd.h>

#include "core/handle.hpp"

namespace shardtune {

struct FdTraits {
  static int null() noexcept { return -1; }
  static void destroy(int fd) noexcept { ::close(fd); }
};
using UniqueFd = UniqueHandle<int, FdTraits>;

UniqueFd open_for_reading(const std::filesystem::path& file);
std::uint64_t file_size(int fd, const std::filesystem::path& file);
// Reads exactly `size` bytes at `offset` or fails; EINTR and short reads are continued. Error{data} when the file ends early.
void pread_exactly(int fd, void* into, std::size_t size, std::uint64_t offset, const std::filesystem::path& file);
std::string read_file(const std::filesystem::path& file, std::size_t max_bytes = std::size_t{1} << 32);

// Error{config} where --output names the very file that is read: opening it would empty it.
void check_output_is_other(const std::string& output, const std::string& input);

// Error{io} for a failed write, creation or sync of a file: "cannot <action> FILE: <what the system said of `code`>"
// and what to do about a full disk or missing permission.
const char* write_advice(int code);  // the latter: " (...)", or "" for other errors
[[noreturn]] void fail_writing(const char* action, const std::filesystem::path& file, int code);

// Writes all bytes (EINTR, short writes continued).
void write_all(int fd, std::string_view bytes, const std::filesystem::path& file);
// Whole file so that after a crash either the old or the new content is there: FILE.tmp, fsync, rename, fsync directory.
// A failed fsync is never retried on the same file (the kernel has dropped the pages by then).
void write_file_durably(const std::filesystem::path& file, std::string_view bytes);
void fsync_path(const std::filesystem::path& file_or_directory);
void fsync_parent(const std::filesystem::path& path);  // the directory that names it
void rename_path(const std::filesystem::path& from, const std::filesystem::path& to);
// The directory and those above it that are missing; each that is made outlives a loss of power (its parent is synced).
// Nothing happens when it is there. Error{io}.
void make_directories_durably(const std::filesystem::path& directory);

}  // namespace shardtune
