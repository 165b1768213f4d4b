#pragma once
// The "post_processor" section of tokenizer.json: special tokens around the sequences, token types, trimmed offsets.
// BertProcessing, RobertaProcessing, TemplateProcessing, ByteLevel and Sequence.
#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "data/tokenizer.hpp"
#include "data/tokenizer_error.hpp"

namespace shardtune {

// Part of a template: a text (0 or 1) or special tokens.
struct TemplatePiece {
  int sequence = -1;  // -1: special tokens
  std::int32_t type_id = 0;
  std::vector<std::int32_t> ids;
  std::vector<std::string> tokens;
};
using Template = std::vector<TemplatePiece>;

// Immutable.
class PostProcessor {
 public:
  PostProcessor();  // texts one after the other, types 0 and 1
  PostProcessor(const nlohmann::json& value, const FieldPath& path);

  std::int64_t added_tokens(bool is_pair) const;
  // parts: one encoding or two, without special tokens, after truncation. Consumed.
  Encoding process(std::vector<Encoding>&& parts, const EncodeOptions& options) const;
  const Template& special_template(bool is_pair) const { return is_pair ? pair_ : single_; }

 private:
  void read(const nlohmann::json& value, const FieldPath& path, int depth);
  void read_template(const nlohmann::json& value, const FieldPath& path);
  void read_bert_like(const nlohmann::json& value, const FieldPath& path, bool is_roberta);
  void set_templates(Template single, Template pair, const FieldPath& path);

  Template single_, pair_;
  bool has_template_ = false;
  std::vector<bool> trims_;  // one per ByteLevel with trim_offsets: its add_prefix_space
};

}  // namespace shardtune
