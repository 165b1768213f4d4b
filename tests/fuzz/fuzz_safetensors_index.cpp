// model.safetensors.index.json beside two files, one in its directory and one outside, which must not be opened.
#include <ATen/ops/ones.h>

#include "checkpoint/safetensors.hpp"
#include "tests/fuzz/fuzz_support.hpp"

namespace {
namespace fs = std::filesystem;

void write_tensors(const fs::path& file, const char* first, const char* second) {
  shardtune::SafetensorsWriter writer(file, {{first, "F32", {2, 3}}, {second, "BF16", {1}}});
  writer.write(at::ones({6}));
  writer.write(at::ones({1}));
  writer.commit();
}

fs::path make_model() {
  const fs::path outside = shardtune::fuzz::scratch_directory(), model = outside / "model";
  fs::create_directories(model);
  write_tensors(model / "a.safetensors", "x", "y");
  write_tensors(model / "b.safetensors", "z", "w");
  write_tensors(outside / "c.safetensors", "outside", "v");
  return model;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  using namespace shardtune;
  static const fs::path model = make_model();
  fuzz::put(model / "model.safetensors.index.json", fuzz::as_text(bytes, size));
  fuzz::accepts([&] {
    for (const auto& [name, entry] : read_model_headers(model)) fuzz::require(entry.file.parent_path() == model);
  });
  return 0;
}
