#pragma once
// The "normalizer" section of tokenizer.json: BertNormalizer, NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip,
// Replace, Prepend and Sequence, with the results and alignments of Hugging Face's tokenizers.
#include <memory>

#include <nlohmann/json_fwd.hpp>

#include "data/aligned_text.hpp"
#include "data/tokenizer_error.hpp"

namespace shardtune {

// Immutable; apply() may be called from many threads with an arena each.
class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual Piece apply(const Piece& piece, TextArena& arena) const = 0;
};

// nullptr for null: nothing to do. Error{data} for a type that is not supported.
std::unique_ptr<Normalizer> make_normalizer(const nlohmann::json& value, const FieldPath& path);

struct BertNormalizerOptions {
  bool clean_text = true;
  bool handle_cjk = true;
  bool strip_accents = true;
  bool lowercase = true;
};
std::unique_ptr<Normalizer> make_bert_normalizer(const BertNormalizerOptions& options);

enum class NormalForm { nfd, nfc, nfkd, nfkc };
std::vector<AlignedChar> normalize(const std::vector<AlignedChar>& chars, NormalForm form, std::int32_t origin);
std::unique_ptr<Normalizer> make_form_normalizer(NormalForm form);

}  // namespace shardtune
