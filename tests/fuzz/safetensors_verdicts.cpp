// Reads safetensors files from standard input, each behind its size (8 bytes, little-endian), and prints a line for
// each: "accept", or "refuse" and the reason. For tests/parity/verdicts.py, which compares with the reference
// implementation.
#include <cstdio>
#include <iostream>
#include <string>

#include "checkpoint/safetensors.hpp"
#include "tests/fuzz/fuzz_support.hpp"

int main() {
  using namespace shardtune;
  const auto file = fuzz::scratch_directory() / "model.safetensors";
  std::uint64_t size = 0;
  std::string bytes;
  while (std::cin.read(reinterpret_cast<char*>(&size), sizeof size)) {
    bytes.resize(size);
    if (!std::cin.read(bytes.data(), static_cast<std::streamsize>(size))) return 1;
    fuzz::put(file, bytes);
    std::string reason;
    const bool is_good = fuzz::accepts([&] {
      try {
        read_safetensors_header(file);
      } catch (const Error& e) {
        reason = e.what();
        throw;
      }
    });
    for (char& c : reason)
      if (c == '\n') c = ' ';
    std::printf("%s %s\n", is_good ? "accept" : "refuse", reason.c_str());
  }
}
