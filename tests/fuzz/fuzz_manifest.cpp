// manifest.json, as it is and with the right checksum, which no fuzzer guesses.
#include <fmt/format.h>

#include "checkpoint/manifest.hpp"
#include "core/hash.hpp"
#include "tests/fuzz/fuzz_support.hpp"

namespace shardtune::fuzz {
namespace {

// What parse_manifest promises of whatever it accepts.
void check(const Manifest& manifest) {
  for (const ManifestTensor& tensor : manifest.tensors) {
    std::int64_t covered = 0;
    for (const ManifestSlice& slice : tensor.slices) {
      require(slice.offset == covered && slice.numel > 0 && slice.file < manifest.files.size());
      const std::uint64_t size = manifest.files[slice.file].data_size(), bytes = static_cast<std::uint64_t>(slice.numel) * tensor.element_bytes();
      require(bytes <= size && slice.byte_offset <= size - bytes);
      covered += slice.numel;
    }
    require(covered == tensor.numel());
  }
  const Manifest again = parse_manifest(serialize_manifest(manifest), "again");
  require(again.tensors.size() == manifest.tensors.size() && again.run == manifest.run && again.step == manifest.step);
}

}  // namespace
}  // namespace shardtune::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  using namespace shardtune;
  const std::string_view text = fuzz::as_text(bytes, size);
  fuzz::accepts([&] { fuzz::check(parse_manifest(text, "manifest.json")); });
  const std::string signed_text = fmt::format("{},\"checksum\":\"{}\"}}\n", text, to_hex(hash_bytes(text)));
  fuzz::accepts([&] { fuzz::check(parse_manifest(signed_text, "manifest.json")); });
  return 0;
}
