#include "data/line_reader.hpp"

#include <cerrno>
#include <cstring>

#include <fmt/format.h>
#include <unistd.h>

#include "core/error.hpp"
#include "data/utf8.hpp"

namespace shardtune {
namespace {
constexpr std::size_t kChunkBytes = std::size_t{1} << 17;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
}  // namespace

LineReader::LineReader(const std::filesystem::path& file, std::size_t max_line_bytes)
    : name_(file.string()), fd_(open_for_reading(file)), max_line_bytes_(max_line_bytes) {
  while (buffer_.size() < kByteOrderMark.size() && fill()) {
  }
  if (buffer_.substr(0, kByteOrderMark.size()) == kByteOrderMark) begin_ = scanned_ = kByteOrderMark.size();
  const std::string_view mark = std::string_view(buffer_).substr(0, 2);
  if (mark == "\xFF\xFE" || mark == "\xFE\xFF")
    refuse(1, 1,
           "the file is UTF-16 (byte order mark); convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8");
}

bool LineReader::fill() {
  if (at_end_) return false;
  buffer_.erase(0, begin_);
  scanned_ -= begin_;
  begin_ = 0;
  const std::size_t old_size = buffer_.size();
  buffer_.resize(old_size + kChunkBytes);
  ssize_t got = 0;
  do got = ::read(fd_.get(), buffer_.data() + old_size, kChunkBytes);
  while (got < 0 && errno == EINTR);
  const int error = errno;
  buffer_.resize(old_size + static_cast<std::size_t>(got > 0 ? got : 0));
  if (got < 0)
    fail(error == EISDIR ? ErrorKind::data : ErrorKind::io,
         fmt::format("{}: cannot be read: {}", name_, std::strerror(error)));
  bytes_read_ += static_cast<std::uint64_t>(got);
  at_end_ = got == 0;
  return got > 0;
}

bool LineReader::next(std::string_view& line) {
  for (;;) {
    const void* found = std::memchr(buffer_.data() + scanned_, '\n', buffer_.size() - scanned_);
    const std::size_t end =
        found == nullptr ? buffer_.size() : static_cast<std::size_t>(static_cast<const char*>(found) - buffer_.data());
    if (end - begin_ > max_line_bytes_)
      refuse(line_ + 1, 0, fmt::format("the line is longer than the limit of {} bytes", max_line_bytes_));
    scanned_ = end;
    if (found == nullptr && fill()) continue;
    // fill() moves the unread bytes to the front, also when it finds the end of the file.
    const std::size_t stop = found == nullptr ? buffer_.size() : end;
    if (found == nullptr && stop == begin_) return false;
    line = std::string_view(buffer_).substr(begin_, stop - begin_);
    begin_ = scanned_ = found == nullptr ? stop : stop + 1;
    ++line_;
    check(line);
    return true;
  }
}

void LineReader::check(std::string_view line) const {
  const std::size_t invalid = valid_utf8_prefix(line);
  if (invalid != line.size())
    refuse(line_, invalid + 1,
           fmt::format("invalid UTF-8 (byte 0x{:02x}); the file must be UTF-8",
                       static_cast<unsigned char>(line[invalid])));
  const std::size_t nul = line.find('\0');
  if (nul != std::string_view::npos) refuse(line_, nul + 1, "NUL byte; is the file binary or UTF-16?");
}

void LineReader::refuse(std::int64_t line, std::size_t column, const std::string& what) const {
  if (column == 0) fail(ErrorKind::data, fmt::format("{}:{}: {}", name_, line, what));
  fail(ErrorKind::data, fmt::format("{}:{}:{}: {}", name_, line, column, what));
}

std::string_view without_cr(std::string_view line) noexcept {
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

}  // namespace shardtune
