#include <cstdio>
#include <fstream>
#include <iostream>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"
#include "data/readers.hpp"
#include "data/tokenizer.hpp"
#include "launcher/offline_commands.hpp"

namespace shardtune {
namespace {

std::string text_of(const nlohmann::json& row, const std::string& column, const std::string& where) {
  const auto text = row.find(column);
  if (text == row.end()) fail(ErrorKind::data, fmt::format("{}: no column '{}'; name the text's column with --text_column", where, column));
  if (!text->is_string()) fail(ErrorKind::data, fmt::format("{}: column '{}' holds {}, a string is needed", where, column, text->dump()));
  return text->get<std::string>();
}

std::string row_line(std::int64_t index, const Encoding& encoding) {
  nlohmann::ordered_json row{{"index", index}, {"input_ids", encoding.ids}, {"token_type_ids", encoding.type_ids},
                             {"tokens", encoding.tokens}, {"offsets", encoding.offsets}};
  return row.dump() + '\n';
}

}  // namespace

int run_tokenize(const Invocation& invocation) {
  const TokenizeOptions& options = invocation.tokenize;
  const std::string& directory = invocation.run.model.tokenizer_name;
  if (directory.empty()) fail(ErrorKind::config, "--tokenizer is missing: a directory with tokenizer.json");
  if (options.input.empty()) fail(ErrorKind::config, "--input is missing: the file of rows to read");
  if (options.max_length < 0) fail(ErrorKind::config, fmt::format("--max_length = {}: 0 (= no truncation) or more is needed", options.max_length));
  check_output_is_other(options.output, options.input);
  const auto tokenizer = load_tokenizer(directory);
  const bool is_file = !options.output.empty() && options.output != "-";
  std::ofstream file;
  if (is_file) file.open(options.output, std::ios::binary | std::ios::trunc);
  std::ostream& out = is_file ? static_cast<std::ostream&>(file) : std::cout;
  if (!out) fail(ErrorKind::io, fmt::format("--output = {}: cannot be created", options.output));

  const EncodeOptions encode{.add_special_tokens = options.add_special_tokens, .want_details = true, .max_length = options.max_length};
  std::int64_t index = 0;
  read_rows(options.input, [&](nlohmann::json&& row, std::int64_t line) {
    const std::string where = fmt::format("{}:{}", options.input, line);
    const std::string text = text_of(row, options.text_column, where);
    std::optional<std::string> pair;
    if (!options.text_pair_column.empty() && row.contains(options.text_pair_column)) pair = text_of(row, options.text_pair_column, where);
    out << row_line(index++, tokenizer->encode(text, pair, encode));
  });
  out.flush();
  if (!out) fail(ErrorKind::io, fmt::format("--output = {}: cannot be written", options.output));
  return 0;
}

}  // namespace shardtune
