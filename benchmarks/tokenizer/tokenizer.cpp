// See compare.py in this folder, which starts it.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/allocator.hpp"
#include "core/file.hpp"
#include "data/tokenizer.hpp"

namespace {

// DIR with tokenizer.json, a JSON list of texts, and the file that gets their ids: int32, one text after another.
// Prints the seconds that one thread took for all texts.
void run(const std::string& tokenizer_dir, const std::string& texts_file, const std::string& ids_file) {
  const auto tokenizer = shardtune::load_tokenizer(tokenizer_dir);
  const auto texts = nlohmann::json::parse(shardtune::read_file(texts_file)).get<std::vector<std::string>>();
  std::vector<std::vector<std::int32_t>> ids(texts.size());
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < texts.size(); ++i) ids[i] = tokenizer->encode(texts[i], std::nullopt, {}).ids;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::string bytes;
  for (const std::vector<std::int32_t>& row : ids)
    bytes.append(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(std::int32_t));
  shardtune::write_file_durably(ids_file, bytes);
  std::printf("%.6f\n", seconds);
}

}  // namespace

int main(int argc, char** argv) {
  shardtune::tune_allocator();
  if (argc != 4) {
    std::fprintf(stderr, "usage: benchmark_tokenizer TOKENIZER_DIR TEXTS.json IDS\n");
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "benchmark_tokenizer: %s\n", e.what());
    return 1;
  }
  return 0;
}
