#pragma once
// What io_shim and its users share. Its log: a header, then two paths and the data, without padding.
#include <cstddef>
#include <cstdint>

namespace shardtune {

enum class IoOperation : std::uint32_t {
  create,          // a: path; offset: 1 when an existing file is emptied
  write,           // a: path; data at offset
  truncate,        // a: path; offset: the new length
  sync,            // a: path of a file or directory
  rename,          // a to b
  make_directory,  // a: path
  remove,          // a: path of a file or an empty directory
};

struct IoRecordHeader {
  IoOperation operation;
  std::uint32_t a_bytes, b_bytes;
  std::uint64_t offset, data_bytes;
};

// Functions of io_shim, found by dlsym in a program that runs with it. From arm() on the calls below `directory` are
// counted, and the k-th (from 1) fails with `error`, or for 0 writes only a part; a call that cannot be short is left
// alone. failed() gives "<call> <path>" of the one that has failed, or ""; disarm() the same and the number of calls.
using IoShimArm = void(const char* directory, long k, int error);
using IoShimFailed = void(char* failed, std::size_t size);
using IoShimDisarm = long(char* failed, std::size_t size);

}  // namespace shardtune
