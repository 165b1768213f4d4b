// A safetensors file: whatever header is accepted describes tensors inside the file that can be read.
#include <ATen/ops/empty.h>

#include "checkpoint/safetensors.hpp"
#include "tests/fuzz/fuzz_support.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  using namespace shardtune;
  static const auto file = fuzz::scratch_directory() / "model.safetensors";
  fuzz::put(file, fuzz::as_text(bytes, size));
  fuzz::accepts([&] {
    for (const auto& [name, entry] : read_safetensors_header(file)) {
      fuzz::require(entry.begin >= 8 && entry.begin <= entry.end && entry.end <= size);
      const std::int64_t numel = entry.numel();
      fuzz::require(numel >= 0 &&
                    static_cast<std::uint64_t>(numel) <= 2 * (entry.end - entry.begin));  // 4 bits at least
      const at::Tensor values = at::empty({numel}, at::kFloat);
      fuzz::accepts([&] { read_safetensors_slice(entry, 0, values); });  // refused for dtypes that are no weights
    }
  });
  return 0;
}
