#pragma once
// tokenizer.json read in one pass: the vocabulary and the merges, which are nearly all of its bytes, stay text for
// readers of their own; the rest becomes JSON with core's checks.
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "data/tokenizer_error.hpp"
#include "data/vocabulary.hpp"

namespace shardtune {

struct TokenizerJson {
  nlohmann::json rest;      // the document with model.vocab and model.merges null
  std::string_view vocab;   // text of model.vocab, empty when absent; views the text that was split
  std::string_view merges;  // text of model.merges
};

// Error{data} naming path and byte offset for invalid UTF-8 and for what is no JSON object.
TokenizerJson split_tokenizer_json(std::string_view text, const FieldPath& path);

// {"token": id, ...}. Ids must be unique and leave few holes, tokens unique.
Vocabulary read_vocabulary(std::string_view object, const FieldPath& path);

// ["a b", ...] or [["a", "b"], ...]: calls handler(rank, first, second) in order.
using MergeHandler = std::function<void(std::int32_t, std::string_view, std::string_view)>;
void read_merges(std::string_view array, const FieldPath& path, const MergeHandler& handler);

}  // namespace shardtune
