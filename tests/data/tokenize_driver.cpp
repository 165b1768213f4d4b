// tokenize --tokenizer DIR --input F --output F [--ids_only true] [--pair_separator S] [--max_length N] [--repeat N]:
// the tokenizer alone, with the rows of the `tokenize` subcommand. Input: JSONL rows {"text", "text_pair"?}. With
// --repeat it encodes all rows N times and reports load time and speed on standard error instead of writing rows.
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "data/tokenizer.hpp"

namespace {

using shardtune::Encoding;

nlohmann::json row_of(std::size_t index, Encoding&& encoding, bool details) {
  nlohmann::json row{
      {"index", index}, {"input_ids", std::move(encoding.ids)}, {"token_type_ids", std::move(encoding.type_ids)}};
  if (details) row["tokens"] = std::move(encoding.tokens), row["offsets"] = std::move(encoding.offsets);
  return row;
}

int run(std::map<std::string, std::string>& arguments) {
  const auto seconds_since = [](std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  const auto before_load = std::chrono::steady_clock::now();
  const auto tokenizer = shardtune::load_tokenizer(arguments["--tokenizer"]);
  const double load_seconds = seconds_since(before_load);

  std::vector<nlohmann::json> rows;
  std::ifstream input(arguments["--input"]);
  for (std::string line; std::getline(input, line);) rows.push_back(nlohmann::json::parse(line));

  shardtune::EncodeOptions options;
  options.want_details = arguments["--ids_only"] != "true";
  if (arguments.contains("--max_length")) options.max_length = std::stoll(arguments["--max_length"]);
  if (arguments.contains("--add_special_tokens"))
    options.add_special_tokens = arguments["--add_special_tokens"] == "true";
  const auto encode = [&](const nlohmann::json& row) {
    const auto& text = row["text"].get_ref<const std::string&>();
    if (!row.contains("text_pair")) return tokenizer->encode(text, std::nullopt, options);
    return tokenizer->encode(text, row["text_pair"].get_ref<const std::string&>(), options);
  };
  if (arguments.contains("--repeat")) {
    const int repeats = std::stoi(arguments["--repeat"]);
    std::size_t bytes = 0, tokens = 0;
    const auto before = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i)
      for (const nlohmann::json& row : rows) {
        bytes += row["text"].get_ref<const std::string&>().size();
        tokens += encode(row).ids.size();
      }
    const double seconds = seconds_since(before);
    std::fprintf(stderr, "load %.1f ms, %.2f MB/s, %.2f Mtokens/s\n", load_seconds * 1e3,
                 static_cast<double>(bytes) / seconds / 1e6, static_cast<double>(tokens) / seconds / 1e6);
    return 0;
  }
  std::ofstream output(arguments["--output"]);
  for (std::size_t i = 0; i < rows.size(); ++i)
    output << row_of(i, encode(rows[i]), options.want_details).dump() << '\n';
  return output.flush() ? 0 : 4;
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> arguments;
  // A leading subcommand name is accepted so that the comparison script can drive this and the program alike.
  for (int i = argc > 1 && std::string(argv[1]) == "tokenize" ? 2 : 1; i + 1 < argc; i += 2)
    arguments[argv[i]] = argv[i + 1];
  try {
    return run(arguments);
  } catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 3;
  }
}
