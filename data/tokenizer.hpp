#pragma once
// Hugging Face tokenizer.json in C++: ids equal to the `tokenizers` library's.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/model_files.hpp"

namespace shardtune {

struct Encoding {
  std::vector<std::int32_t> ids;
  std::vector<std::int32_t> type_ids;                              // 0, or 1 for the second text of a pair
  std::vector<std::string> tokens;
  std::vector<std::pair<std::int32_t, std::int32_t>> offsets;      // [begin, end) in code points of the text, as HF
};

struct EncodeOptions {
  bool add_special_tokens = true;
  bool want_details = false;      // fill tokens and offsets too (slower)
  // 0 = no limit. Otherwise HF's truncation=True, max_length (longest_first for pairs), special tokens counted.
  std::int64_t max_length = 0;
};

// Immutable after construction: encode() may be called from many threads.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // text must be valid UTF-8 (readers check); pair: the second text of a pair task.
  virtual Encoding encode(std::string_view text, std::optional<std::string_view> pair,
                          const EncodeOptions& options) const = 0;
  virtual std::int64_t vocab_size() const = 0;  // with added tokens
  virtual std::optional<std::int32_t> token_to_id(std::string_view token) const = 0;
  virtual std::string id_to_token(std::int32_t id) const = 0;
};

// DIR/tokenizer.json (tokenizer_config.json for model_max_length and added tokens where present).
// Error{data} naming the file and the field for anything missing, malformed or not supported.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& model_dir);

// The files of a tokenizer that an exported model must carry, present in model_dir: name and content.
CompanionFiles tokenizer_files(const std::filesystem::path& model_dir);

}  // namespace shardtune
