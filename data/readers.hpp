#pragma once
// Rows of JSONL, JSON array, CSV (RFC 4180), TSV and plain text files, checked. Thread-compatible.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace shardtune {

// One row as a JSON object (CSV, TSV: column name to string; text: {"text": line}); line counts from 1.
using RowHandler = std::function<void(nlohmann::json&& row, std::int64_t line)>;

// Calls handler for each row in file order. TSV and CSV need a header line, except TSV files named with columns given
// through `column_names` (SST-2 style files without header). Error{data}: missing or empty file, invalid UTF-8, bad
// JSON, a row with another number of columns; each names file and line.
void read_rows(const std::filesystem::path& file, const RowHandler& handler,
               const std::vector<std::string>& column_names = {});

}  // namespace shardtune
