#include "core/error.hpp"

namespace shardtune {

Error::Error(ErrorKind kind, const std::string& message, std::source_location where)
    : std::runtime_error(message), kind_(kind), where_(where) {}

int exit_code(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::config: return 2;
    case ErrorKind::data: return 3;
    case ErrorKind::io: return 4;
    case ErrorKind::comm: return 5;
    case ErrorKind::numeric: return 6;
    case ErrorKind::internal: return 70;
  }
  return 70;
}

const char* to_string(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::config: return "configuration";
    case ErrorKind::data: return "data";
    case ErrorKind::io: return "input/output";
    case ErrorKind::comm: return "communication";
    case ErrorKind::numeric: return "numerical";
    case ErrorKind::internal: return "internal";
  }
  return "internal";
}

void fail(ErrorKind kind, const std::string& message, std::source_location where) {
  throw Error(kind, message, where);
}

}  // namespace shardtune
