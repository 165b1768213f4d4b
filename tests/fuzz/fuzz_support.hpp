#pragma once
// What the fuzz targets share. A target is LLVMFuzzerTestOneInput(bytes): libFuzzer calls it with what it makes up
// (preset `fuzz`, scripts/fuzz), replay_main.cpp with every file of its corpus (every other preset, as a test).
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

#include "core/error.hpp"

namespace shardtune::fuzz {

// A finding: neither libFuzzer nor the test goes on.
inline void require(bool fact) {
  if (!fact) std::abort();
}

// Either `read` succeeds or it refuses its input: any other exception, also Error{internal}, is a finding. True =
// accepted.
template <class Read>
bool accepts(const Read& read) {
  try {
    read();
    return true;
  } catch (const Error& e) {
    require(e.kind() == ErrorKind::data || e.kind() == ErrorKind::config);
    require(std::string_view(e.what()).size() < 4096);  // a message for people, not the input once more
    return false;
  }
}

// A directory of this process below TMPDIR, gone when it ends.
const std::filesystem::path& scratch_directory();
// Makes FILE hold exactly these bytes.
void put(const std::filesystem::path& file, std::string_view bytes);

inline std::string_view as_text(const std::uint8_t* bytes, std::size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

}  // namespace shardtune::fuzz
