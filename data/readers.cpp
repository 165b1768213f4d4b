#include "data/readers.hpp"

#include <algorithm>
#include <cctype>
#include <string_view>
#include <unordered_set>
#include <utility>

#include <fmt/format.h>

#include "core/error.hpp"
#include "core/json.hpp"
#include "data/line_reader.hpp"
#include "data/utf8.hpp"

namespace shardtune {
namespace {

// A JSON array is often written on one line, so its line limit is that of the file; rows keep theirs.
constexpr std::size_t kMaxArrayLineBytes = std::size_t{4} << 30;
constexpr std::size_t kMaxMessageBytes = 1000;

// Counts rows, and stops the reading by returning false.
class RowSink {
 public:
  RowSink(const RowHandler& handler, std::int64_t max_rows) : handler_(handler), max_rows_(max_rows) {}
  bool operator()(const LineReader& lines, nlohmann::json&& row, std::int64_t line) {
    if (count_ == kMaxRows) lines.refuse(line, 0, fmt::format("more than {} rows", kMaxRows));
    handler_(std::move(row), line);
    ++count_;
    return count_ != max_rows_;
  }
  std::int64_t count() const { return count_; }

 private:
  const RowHandler& handler_;
  std::int64_t max_rows_;
  std::int64_t count_ = 0;
};

// The parser counts lines inside the text it gets, here one row: its "line 1" would contradict the line of the file.
std::string without_parser_noise(std::string message) {
  for (const auto& [from, to] : {std::pair<std::string_view, std::string_view>{"[json.exception.parse_error.101] ", ""},
                                 {"parse error at line 1, column", "at column"},
                                 {"parse error at line", "at line (of the row)"}}) {
    const std::size_t at = message.find(from);
    if (at != std::string::npos) message.replace(at, from.size(), to);
  }
  if (valid_utf8_prefix(message) != message.size()) return message;
  return std::string(utf8_head(message, kMaxMessageBytes));
}

nlohmann::json parse_object(const LineReader& lines, std::string_view text, std::int64_t line) {
  JsonLimits limits;
  limits.max_bytes = kMaxRowBytes;
  nlohmann::json row;
  try {
    row = parse_json(text, fmt::format("{}:{}", lines.name(), line), limits);
  } catch (const Error& error) {
    fail(error.kind(), without_parser_noise(error.what()));
  }
  if (!row.is_object())
    lines.refuse(line, 0,
                 fmt::format("a row must be a JSON object such as {{\"text\": \"...\"}}, this is {} {}",
                             row.is_array() ? "an" : "a", row.type_name()));
  return row;
}

bool is_json_space(char c) { return c == ' ' || c == '\t' || c == '\r'; }

void read_json_lines(LineReader& lines, std::string_view line, RowSink& sink) {
  do {
    if (std::all_of(line.begin(), line.end(), is_json_space)) continue;
    if (!sink(lines, parse_object(lines, line, lines.line()), lines.line())) return;
  } while (lines.next(line));
}

// Cuts a top-level array into the texts of its elements by strings and brackets alone; parse_object judges each.
class JsonArraySplitter {
 public:
  JsonArraySplitter(LineReader& lines, RowSink& sink) : lines_(lines), sink_(sink) {}

  void run(std::string_view line) {
    do {
      for (std::size_t i = 0; i < line.size(); ++i)
        if (!(depth_ > 0 ? inside(line[i]) : between(line[i], i + 1))) return;
      if (depth_ > 0) element_ += '\n';
    } while (lines_.next(line));
    if (depth_ > 0) lines_.refuse(first_line_, 0, "the JSON object that begins here is never closed");
    if (state_ != State::done) lines_.refuse(lines_.line(), 0, "the JSON array is not closed with ']'");
  }

 private:
  enum class State { open, first, comma_or_end, value, done };

  bool between(char c, std::size_t column) {
    if (is_json_space(c)) return true;
    const auto expect = [&](const char* what) {
      lines_.refuse(lines_.line(), column, fmt::format("expected {} in a JSON array of objects", what));
    };
    switch (state_) {
      case State::open: state_ = State::first; return true;  // the caller has seen '['
      case State::done: expect("nothing after ']'"); return false;
      case State::comma_or_end:
        if (c != ',' && c != ']') expect("',' or ']'");
        state_ = c == ',' ? State::value : State::done;
        return true;
      case State::first:
      case State::value:
        if (c == ']' && state_ == State::first) {
          state_ = State::done;
          return true;
        }
        if (c != '{') expect("an object '{'");
        first_line_ = lines_.line();
        return inside(c);
    }
    return false;
  }

  bool inside(char c) {
    element_ += c;
    if (element_.size() > kMaxRowBytes)
      lines_.refuse(first_line_, 0, fmt::format("the row is longer than the limit of {} bytes", kMaxRowBytes));
    if (in_string_) {
      if (escaped_)
        escaped_ = false;
      else if (c == '\\')
        escaped_ = true;
      else if (c == '"')
        in_string_ = false;
      return true;
    }
    in_string_ = c == '"';
    if (c == '{' || c == '[') ++depth_;
    if (c != '}' && c != ']') return true;
    if (--depth_ > 0) return true;
    state_ = State::comma_or_end;
    const bool go_on = sink_(lines_, parse_object(lines_, element_, first_line_), first_line_);
    element_.clear();
    return go_on;
  }

  LineReader& lines_;
  RowSink& sink_;
  State state_ = State::open;
  std::string element_;
  std::int64_t first_line_ = 0;
  int depth_ = 0;
  bool in_string_ = false, escaped_ = false;
};

void read_json(LineReader& lines, RowSink& sink) {
  std::string_view line;
  while (lines.next(line)) {
    const auto first = std::find_if_not(line.begin(), line.end(), is_json_space);
    if (first == line.end()) continue;
    if (*first == '[')
      JsonArraySplitter(lines, sink).run(line);
    else
      read_json_lines(lines, line, sink);
    return;
  }
}

// Fields of one record; the line it begins on. False at the end of the file.
using Fields = std::vector<std::string>;

class CsvRecords {
 public:
  explicit CsvRecords(LineReader& lines) : lines_(lines) {}

  bool next(Fields& fields, std::int64_t& record_line) {
    std::string_view line;
    do {
      if (!lines_.next(line)) return false;
    } while (without_cr(line).empty());
    record_line = lines_.line();
    fields.clear();
    state_ = State::start;
    for (std::size_t bytes = line.size();; bytes += line.size() + 1) {
      if (bytes > kMaxRowBytes)
        lines_.refuse(quote_line_, 0,
                      fmt::format("the quoted field that begins here is longer than {} bytes", kMaxRowBytes));
      parse(line, fields);
      if (state_ != State::quoted) break;
      field_ += '\n';
      if (!lines_.next(line)) lines_.refuse(quote_line_, quote_column_, "the quote that opens here is never closed");
    }
    finish(fields);
    return true;
  }

 private:
  enum class State { start, plain, quoted, after_quote };

  void finish(Fields& fields) {
    fields.push_back(std::move(field_));
    field_.clear();
    state_ = State::start;
  }

  void parse(std::string_view line, Fields& fields) {
    for (std::size_t i = 0; i < line.size(); ++i) {
      const char c = line[i];
      if (state_ == State::quoted) {
        if (c == '"')
          state_ = State::after_quote;
        else
          field_ += c;
      } else if (c == ',') {
        finish(fields);
      } else if (c == '\r') {
        if (i + 1 != line.size()) lines_.refuse(lines_.line(), i + 1, "carriage return inside an unquoted field");
      } else if (c == '"' && state_ == State::start) {
        state_ = State::quoted;
        quote_line_ = lines_.line();
        quote_column_ = i + 1;
      } else if (c == '"' && state_ == State::after_quote) {
        field_ += c;
        state_ = State::quoted;
      } else if (state_ == State::after_quote) {
        lines_.refuse(lines_.line(), i + 1, "a comma or the end of the line must follow a closing quote");
      } else {
        field_ += c;
        state_ = State::plain;
      }
    }
  }

  LineReader& lines_;
  State state_ = State::start;
  std::string field_;
  std::int64_t quote_line_ = 0;
  std::size_t quote_column_ = 0;
};

// TSV: a tab is always a separator and a quote is always a character.
class TsvRecords {
 public:
  explicit TsvRecords(LineReader& lines) : lines_(lines) {}
  bool next(Fields& fields, std::int64_t& record_line) {
    std::string_view line;
    do {
      if (!lines_.next(line)) return false;
      line = without_cr(line);
    } while (line.empty());
    record_line = lines_.line();
    fields.clear();
    for (;;) {
      const std::size_t tab = line.find('\t');
      fields.emplace_back(line.substr(0, tab));
      if (tab == std::string_view::npos) return true;
      line.remove_prefix(tab + 1);
    }
  }

 private:
  LineReader& lines_;
};

void check_columns(const LineReader& lines, const Fields& columns, std::int64_t line) {
  std::unordered_set<std::string_view> seen;
  for (std::size_t i = 0; i < columns.size(); ++i) {
    if (columns[i].empty()) lines.refuse(line, 0, fmt::format("column {} of the header has no name", i + 1));
    if (!seen.insert(columns[i]).second) lines.refuse(line, 0, fmt::format("column '{}' appears twice", columns[i]));
  }
}

template <class Records>
void read_table(LineReader& lines, const Fields& column_names, RowSink& sink) {
  Records records(lines);
  Fields columns = column_names, fields;
  std::int64_t line = 1;
  const bool has_header = columns.empty();
  if (has_header && !records.next(columns, line)) return;
  check_columns(lines, columns, line);
  while (records.next(fields, line)) {
    if (fields.size() != columns.size())
      lines.refuse(line, 0,
                   fmt::format("{} column{}, but {} {} ({})", fields.size(), fields.size() == 1 ? "" : "s",
                               has_header ? "the header has" : "column_names gives", columns.size(),
                               utf8_head(fmt::format("{}", fmt::join(columns, ", ")), kMaxMessageBytes)));
    nlohmann::json row = nlohmann::json::object();
    for (std::size_t i = 0; i < columns.size(); ++i) row[columns[i]] = std::move(fields[i]);
    if (!sink(lines, std::move(row), line)) return;
  }
}

void read_text(LineReader& lines, RowSink& sink) {
  std::string_view line;
  while (lines.next(line))
    if (!sink(lines, nlohmann::json{{"text", without_cr(line)}}, lines.line())) return;
}

std::string lower_extension(const std::filesystem::path& file) {
  std::string extension = file.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return extension;
}

}  // namespace

void read_rows(const std::filesystem::path& file, const RowHandler& handler,
               const std::vector<std::string>& column_names, std::int64_t max_rows) {
  const std::string extension = lower_extension(file);
  constexpr std::string_view kKnown[] = {".jsonl", ".json", ".csv", ".tsv", ".txt"};
  if (std::find(std::begin(kKnown), std::end(kKnown), extension) == std::end(kKnown))
    fail(ErrorKind::data, fmt::format("{}: unknown kind of data file '{}'; the extension must be one of {}",
                                      file.string(), extension, fmt::join(kKnown, ", ")));
  LineReader lines(file, extension == ".json" ? kMaxArrayLineBytes : kMaxRowBytes);
  RowSink sink(handler, max_rows);
  if (extension == ".csv") {
    read_table<CsvRecords>(lines, column_names, sink);
  } else if (extension == ".tsv") {
    read_table<TsvRecords>(lines, column_names, sink);
  } else if (extension == ".txt") {
    read_text(lines, sink);
  } else if (extension == ".json") {
    read_json(lines, sink);
  } else {
    std::string_view line;
    if (lines.next(line)) read_json_lines(lines, line, sink);
  }
  if (sink.count() == 0)
    lines.refuse(std::max<std::int64_t>(lines.line(), 1), 0,
                 lines.is_empty_file() ? "the file is empty" : "the file holds no rows");
}

bool has_untyped_fields(const std::filesystem::path& file) {
  const std::string extension = lower_extension(file);
  return extension == ".csv" || extension == ".tsv";
}

}  // namespace shardtune
