// A library for LD_PRELOAD that watches the system calls which change files below SHIM_DIR, and lets
// one of them fail.
//   SHIM_LOG=<file>   appends every watched call that succeeded, with its data (format: io_record.hpp)
// The program itself may call io_shim_arm and io_shim_disarm (io_record.hpp).
// Calls are serialised, so that the log is the order in which they took effect.
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/fault/io_record.hpp"

namespace {

using shardtune::IoOperation;

template <class Function>
Function* real(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

std::string env(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

struct Shim {
  std::recursive_mutex mutex;
  std::string directory = env("SHIM_DIR");
  long num_calls = 0, fail_at = 0;
  int error = 0;  // 0: a short write
  std::string failed;
  int log_fd = -1;

  Shim() {
    const std::string log = env("SHIM_LOG");
    if (!log.empty())
      log_fd = real<int(const char*, int, ...)>("open")(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  }

  bool watches(const std::string& path) const {
    return !directory.empty() && path.compare(0, directory.size(), directory) == 0;
  }
  bool must_fail(const char* call, const std::string& path, bool can_be_short) {
    if (++num_calls != fail_at || (error == 0 && !can_be_short)) return false;
    failed = std::string(call) + " " + path;
    return true;
  }
  void record(IoOperation operation, const std::string& a, const std::string& b, long offset, const void* data,
              std::size_t size) {
    if (log_fd < 0) return;
    const shardtune::IoRecordHeader header{operation, static_cast<std::uint32_t>(a.size()),
                                           static_cast<std::uint32_t>(b.size()), static_cast<std::uint64_t>(offset),
                                           size};
    const auto write = real<ssize_t(int, const void*, size_t)>("write");
    for (const auto& [bytes, length] : {std::pair<const void*, std::size_t>{&header, sizeof(header)},
                                        {a.data(), a.size()},
                                        {b.data(), b.size()},
                                        {data, size}})
      if (length > 0 && write(log_fd, bytes, length) < 0) std::abort();
  }
};

Shim& shim() {
  static Shim instance;
  return instance;
}

std::string absolute(int dir_fd, const char* path) {
  if (path[0] == '/') return path;
  char target[4096];
  const std::string link = dir_fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/" + std::to_string(dir_fd);
  const ssize_t length = ::readlink(link.c_str(), target, sizeof(target));
  return length < 0 ? std::string(path) : std::string(target, static_cast<std::size_t>(length)) + "/" + path;
}

std::string path_of(int fd) {
  char target[4096];
  const ssize_t length = ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), target, sizeof(target));
  return length < 0 ? "" : std::string(target, static_cast<std::size_t>(length));
}

// Fails, or does `call` and records it. Returns -1 with errno for a failure.
template <class Call>
long guarded(const char* name, IoOperation operation, const std::string& a, const std::string& b, const Call& call) {
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  if (!state.watches(a)) return call();
  if (state.must_fail(name, a, false)) {
    errno = state.error;
    return -1;
  }
  const long result = call();
  if (result >= 0) state.record(operation, a, b, 0, nullptr, 0);
  return result;
}

template <class Call>
ssize_t guarded_write(const char* name, int fd, const void* data, size_t size, long offset, const Call& call) {
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  const std::string path = path_of(fd);
  if (!state.watches(path)) return call(size);
  if (state.must_fail(name, path, size > 1)) {
    if (state.error != 0) {
      errno = state.error;
      return -1;
    }
    size =
        size > 4096 ? size / 8192 * 4096 + (size < 8192 ? 4096 : 0) : size / 2;  // whole pages keep direct writes legal
  }
  const ssize_t result = call(size);
  if (result > 0) state.record(IoOperation::write, path, "", offset, data, static_cast<std::size_t>(result));
  return result;
}

int open_like(const char* name, const std::string& path, int flags, mode_t mode, int (*call)(const char*, int, ...)) {
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  const bool changes = (flags & (O_CREAT | O_TRUNC)) != 0;
  if (!changes || !state.watches(path)) return call(path.c_str(), flags, mode);
  if (state.must_fail(name, path, false)) {
    errno = state.error;
    return -1;
  }
  const int fd = call(path.c_str(), flags, mode);
  if (fd >= 0) state.record(IoOperation::create, path, "", (flags & O_TRUNC) != 0 ? 1 : 0, nullptr, 0);
  return fd;
}

mode_t mode_argument(int flags, std::va_list arguments) {
  return (flags & O_CREAT) != 0 ? static_cast<mode_t>(va_arg(arguments, int)) : 0;
}

}  // namespace

extern "C" {

void io_shim_arm(const char* directory, long k, int error) {
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  state.directory = directory;
  state.num_calls = 0;
  state.fail_at = k;
  state.error = error;
  state.failed.clear();
}
void io_shim_failed(char* failed, std::size_t size) {
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  std::snprintf(failed, size, "%s", state.failed.c_str());
}
long io_shim_disarm(char* failed, std::size_t size) {
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  state.directory.clear();
  std::snprintf(failed, size, "%s", state.failed.c_str());
  return state.num_calls;
}

int open(const char* path, int flags, ...) {
  std::va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_argument(flags, arguments);
  va_end(arguments);
  return open_like("open", absolute(AT_FDCWD, path), flags, mode, real<int(const char*, int, ...)>("open"));
}
int open64(const char* path, int flags, ...) {
  std::va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_argument(flags, arguments);
  va_end(arguments);
  return open_like("open", absolute(AT_FDCWD, path), flags, mode, real<int(const char*, int, ...)>("open64"));
}
ssize_t write(int fd, const void* data, size_t size) {
  static auto* const call = real<ssize_t(int, const void*, size_t)>("write");
  const long offset = ::lseek(fd, 0, SEEK_CUR);
  return guarded_write("write", fd, data, size, offset, [&](size_t part) { return call(fd, data, part); });
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  static auto* const call = real<ssize_t(int, const void*, size_t, off_t)>("pwrite");
  return guarded_write("pwrite", fd, data, size, offset, [&](size_t part) { return call(fd, data, part, offset); });
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
int ftruncate(int fd, off_t length) {
  static auto* const call = real<int(int, off_t)>("ftruncate");
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  const std::string path = path_of(fd);
  if (!state.watches(path)) return call(fd, length);
  if (state.must_fail("ftruncate", path, false)) {
    errno = state.error;
    return -1;
  }
  const int result = call(fd, length);
  if (result == 0) state.record(IoOperation::truncate, path, "", length, nullptr, 0);
  return result;
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
int fsync(int fd) {
  static auto* const call = real<int(int)>("fsync");
  return static_cast<int>(guarded("fsync", IoOperation::sync, path_of(fd), "", [&] { return call(fd); }));
}
int rename(const char* from, const char* to) {
  static auto* const call = real<int(const char*, const char*)>("rename");
  return static_cast<int>(guarded("rename", IoOperation::rename, absolute(AT_FDCWD, from), absolute(AT_FDCWD, to),
                                  [&] { return call(from, to); }));
}
int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned flags) {
  static auto* const call = real<int(int, const char*, int, const char*, unsigned)>("renameat2");
  if (shim().log_fd >= 0) std::abort();  // the log has no record of an exchange
  return static_cast<int>(guarded("renameat2", IoOperation::rename, absolute(from_dir, from), absolute(to_dir, to),
                                  [&] { return call(from_dir, from, to_dir, to, flags); }));
}
// Of a file that was written to. As the kernel does, it is closed even when that fails.
int close(int fd) {
  static auto* const call = real<int(int)>("close");
  if ((::fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY) return call(fd);
  Shim& state = shim();
  const std::lock_guard lock(state.mutex);
  const std::string path = path_of(fd);
  const int result = call(fd);
  if (!state.watches(path) || !state.must_fail("close", path, false)) return result;
  errno = state.error;
  return -1;
}
int mkdir(const char* path, mode_t mode) {
  static auto* const call = real<int(const char*, mode_t)>("mkdir");
  return static_cast<int>(
      guarded("mkdir", IoOperation::make_directory, absolute(AT_FDCWD, path), "", [&] { return call(path, mode); }));
}
int unlink(const char* path) {
  static auto* const call = real<int(const char*)>("unlink");
  return static_cast<int>(
      guarded("unlink", IoOperation::remove, absolute(AT_FDCWD, path), "", [&] { return call(path); }));
}
int rmdir(const char* path) {
  static auto* const call = real<int(const char*)>("rmdir");
  return static_cast<int>(
      guarded("rmdir", IoOperation::remove, absolute(AT_FDCWD, path), "", [&] { return call(path); }));
}
int remove(const char* path) {
  static auto* const call = real<int(const char*)>("remove");
  return static_cast<int>(
      guarded("remove", IoOperation::remove, absolute(AT_FDCWD, path), "", [&] { return call(path); }));
}
int unlinkat(int dir_fd, const char* path, int flags) {
  static auto* const call = real<int(int, const char*, int)>("unlinkat");
  return static_cast<int>(
      guarded("unlinkat", IoOperation::remove, absolute(dir_fd, path), "", [&] { return call(dir_fd, path, flags); }));
}
}
