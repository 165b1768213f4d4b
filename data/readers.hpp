#pragma once
// Rows of JSONL, JSON array, CSV (RFC 4180), TSV and plain text files, checked. Thread-compatible.
// Files are streamed: memory is one row (a JSON array written on one line: that line). Common to all formats: a UTF-8
// byte order mark is skipped, lines end with LF or CRLF, the last one may end without. A row of more than
// kMaxRowBytes, a raw NUL byte and invalid UTF-8 are refused.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace shardtune {

inline constexpr std::size_t kMaxRowBytes = std::size_t{64} << 20;
inline constexpr std::int64_t kMaxRows = INT32_MAX;

// One row as a JSON object (CSV, TSV: column name to string; text: {"text": line}); line counts from 1 and is the one
// the row begins on.
using RowHandler = std::function<void(nlohmann::json&& row, std::int64_t line)>;

// Calls handler for each row in file order, by extension:
//   .jsonl  one object a line, blank lines skipped
//   .json   an array of objects, or the same as .jsonl
//   .csv    comma, RFC 4180 quotes (doubled quotes, line breaks inside); blank lines skipped as pandas does; a quote
//           inside an unquoted field is an ordinary character
//   .tsv    tab, no quoting at all (as SST-2 and GLUE files); blank lines skipped
//   .txt    one row a line, blank lines are rows
// column_names: names for CSV and TSV files without a header line; the other formats carry their own names.
// max_rows: stop after that many, 0 = all; what follows is not read and not checked.
// Error{data}: missing or empty file, unknown extension, invalid UTF-8, bad JSON, a row with another number of columns,
// a quote that is never closed, more than kMaxRows rows; each names file and line. What handler throws passes through.
void read_rows(const std::filesystem::path& file, const RowHandler& handler,
               const std::vector<std::string>& column_names = {}, std::int64_t max_rows = 0);

// CSV and TSV fields have no type: "3" may mean the number. True for those formats.
bool has_untyped_fields(const std::filesystem::path& file);

}  // namespace shardtune
