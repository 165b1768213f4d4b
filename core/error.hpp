#pragma once
// The one exception type of shardtune. Thread-safe: an Error is an immutable value.
#include <source_location>
#include <stdexcept>
#include <string>

namespace shardtune {

// What went wrong decides the process's exit code (see exit_code) and nothing else.
enum class ErrorKind {
  config,    // an option, a configuration file, a combination that cannot be honoured
  data,      // a data, tokenizer or model file that is missing, malformed or does not fit
  io,        // writing failed, or reading failed for a reason outside the file's content
  comm,      // MPI, a lost or disagreeing rank
  numeric,   // non-finite loss or gradients
  internal,  // our bug
};

// message: what, which value, where, what to do. One sentence or two, no trailing newline.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message,
        std::source_location where = std::source_location::current());

  ErrorKind kind() const noexcept { return kind_; }
  const std::source_location& where() const noexcept { return where_; }

 private:
  ErrorKind kind_;
  std::source_location where_;
};

// Exit codes are documented in docs/formats.md: config 2, data 3, io 4, comm 5, numeric 6, internal 70.
int exit_code(ErrorKind kind) noexcept;
inline constexpr int kExitStoppedBySignal = 75;  // a committed checkpoint exists; requeue the job

const char* to_string(ErrorKind kind) noexcept;

[[noreturn]] void fail(ErrorKind kind, const std::string& message,
                       std::source_location where = std::source_location::current());

// For conditions that only our own bugs can break. The condition must be free of side effects.
inline void check_internal(bool condition, const char* message,
                           std::source_location where = std::source_location::current()) {
  if (!condition) fail(ErrorKind::internal, message, where);
}

}  // namespace shardtune
