#pragma once
// Lines of a text file, streamed and checked. Not thread-safe.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "core/file.hpp"

namespace shardtune {

class LineReader {
 public:
  // max_line_bytes: a longer line is Error{data}, so that a binary file cannot fill the memory.
  LineReader(const std::filesystem::path& file, std::size_t max_line_bytes);

  // The next line without its LF; a CR before the LF is still there (see without_cr). False at the end. The view lives
  // until the next call. Error{data} with file, line and byte column for invalid UTF-8 and NUL.
  bool next(std::string_view& line);

  std::int64_t line() const { return line_; }  // of the last line returned, from 1
  bool is_empty_file() const { return bytes_read_ == 0; }
  const std::string& name() const { return name_; }

  // Error{data}: "FILE:LINE: what" or "FILE:LINE:COLUMN: what" (columns are bytes, from 1; 0 = none).
  [[noreturn]] void refuse(std::int64_t line, std::size_t column, const std::string& what) const;

 private:
  bool fill();
  void check(std::string_view line) const;

  std::string name_;
  UniqueFd fd_;
  std::size_t max_line_bytes_;
  std::string buffer_;
  std::size_t begin_ = 0;    // first byte not yet returned
  std::size_t scanned_ = 0;  // no LF in [begin_, scanned_)
  std::uint64_t bytes_read_ = 0;
  std::int64_t line_ = 0;
  bool at_end_ = false;
};

std::string_view without_cr(std::string_view line) noexcept;

}  // namespace shardtune
