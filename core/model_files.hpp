#pragma once
// The files of a Hugging Face model directory that are no weights.
#include <string>
#include <utility>
#include <vector>

namespace shardtune {

using CompanionFiles = std::vector<std::pair<std::string, std::string>>;  // names and contents

// What makes up a tokenizer; a directory holds some of them.
inline constexpr const char* kTokenizerFiles[] = {"tokenizer.json",
                                                  "tokenizer_config.json",
                                                  "special_tokens_map.json",
                                                  "added_tokens.json",
                                                  "vocab.txt",
                                                  "vocab.json",
                                                  "merges.txt",
                                                  "tokenizer.model",
                                                  "chat_template.jinja",
                                                  "chat_template.json"};

}  // namespace shardtune
