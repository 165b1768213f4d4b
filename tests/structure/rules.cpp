#include "tests/structure/rules.hpp"

#include <algorithm>
#include <cctype>
#include <regex>
#include <set>
#include <string_view>

namespace shardtune::structure {
namespace {

// Which layers a layer may include besides itself. The picture is in docs/architecture.md.
const std::map<std::string, std::set<std::string>>& allowed_edges() {
  static const std::map<std::string, std::set<std::string>> edges = {
      {"core", {}},
      {"kernels", {"core"}},
      {"models", {"kernels", "core"}},
      {"distributed/comm", {"core"}},
      {"distributed/parallel", {"distributed/comm", "models", "kernels", "core"}},
      {"data", {"core"}},
      {"checkpoint", {"distributed/comm", "core"}},
      {"trainer",
       {"checkpoint", "distributed/parallel", "distributed/comm", "data", "models", "kernels", "core"}},
      {"launcher",
       {"trainer", "checkpoint", "distributed/parallel", "distributed/comm", "data", "models", "kernels", "core"}},
  };
  return edges;
}

// The layer a path lies in; empty for a path outside every layer.
std::string layer_of(const std::string& path) {
  for (const auto& [layer, below] : allowed_edges()) {
    if (path.starts_with(layer + "/")) return layer;
  }
  return "";
}

struct ThirdPartyRule {
  std::string_view pattern;     // of the include's target
  std::string_view sources;     // pattern of the files that may include it
  std::string_view where;       // the same in words
};
constexpr ThirdPartyRule kThirdPartyRules[] = {
    {"(torch/torch|torch/all|torch/extension)\\.h", "$^", "nowhere"},
    {"mpi\\.h|mpi-ext\\.h", "(distributed/comm/|tests/support/|benchmarks/).*\\.cpp", "distributed/comm/*.cpp"},
    {"nccl\\.h", "$^", "nowhere before the CUDA module"},
    {"(hdf5|H5.*)\\.h", "(checkpoint|tests/checkpoint)/.*\\.cpp", "checkpoint/*.cpp"},
    {"boost/.*", "launcher/.*\\.cpp", "launcher/*.cpp"},
    {"spdlog/.*", "core/log\\.cpp", "core/log.cpp"},
    {"(ATen/ATen|torch/types|torch/csrc/autograd/(custom_function|engine))\\.h", ".*\\.cpp",
     "sources, never in headers: too dear to compile"},
};

std::string at(const SourceFile& file, std::size_t line, const std::string& what) {
  return file.path + ":" + std::to_string(line) + ": " + what;
}

std::string collapsed(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (std::isspace(static_cast<unsigned char>(c)) == 0) {
      out += c;
    } else if (!out.empty() && out.back() != ' ') {
      out += ' ';
    }
  }
  return out;
}

// Does `head`, the text between the previous ';', '{' or '}' and a '{', open a function body?
bool heads_function(const std::string& head) {
  static const std::regex scope(R"(^(template <.*> )?(inline )?(export )?(namespace|class|struct|union|enum|extern)\b)");
  if (head.find(')') == std::string::npos) return false;
  if (!std::regex_search(head, scope)) return true;
  // "struct X f(...) {" is a function, "class X : public Y<void(int)> {" is not: a function's head ends after its ')'.
  static const std::regex tail(R"(\)( const| noexcept| override| final)* ?$)");
  return std::regex_search(head, tail) && head.find(" : ") == std::string::npos;
}

// Is the '{' after `head` a member's initialiser ("X(int a) : a_{a}, b_{" ...) and not yet the constructor's body?
bool heads_initialiser(const std::string& head) {
  static const std::regex list(R"(\) ?(noexcept )?: ?[^:].*[\w>]$)");
  return std::regex_search(head, list);
}

// "name" out of "auto Type::name(args) const": the last identifier before the first '('.
std::string function_name(const std::string& head) {
  static const std::regex name(R"(([~\w:]+|operator ?\S+) ?\()");
  std::smatch match;
  return std::regex_search(head, match, name) ? match[1].str() : head;
}

std::string without_preprocessor(std::string text) {
  static const std::regex directive(R"((^|\n)[ \t]*#([^\n]*\\\n)*[^\n]*)");
  std::string out;
  std::size_t done = 0;
  for (std::sregex_iterator it(text.begin(), text.end(), directive), end; it != end; ++it) {
    out.append(text, done, static_cast<std::size_t>(it->position()) - done);
    for (const char c : it->str()) out += c == '\n' ? '\n' : ' ';
    done = static_cast<std::size_t>(it->position() + it->length());
  }
  return out.append(text, done);
}

}  // namespace

std::vector<std::string> layering_violations(const SourceFile& file) {
  std::vector<std::string> found;
  const std::string from = layer_of(file.path);
  if (from.empty()) return {file.path + ": lies in no layer"};
  for (const Include& include : includes_of(file)) {
    const std::string to = layer_of(include.target);
    if (to.empty()) {
      if (include.quoted) {
        found.push_back(at(file, include.line, "\"" + include.target + "\" is no path from the root into a layer"));
      }
      continue;
    }
    if (!include.quoted) found.push_back(at(file, include.line, "project header <" + include.target + "> in angle brackets"));
    if (to != from && !allowed_edges().at(from).contains(to)) {
      found.push_back(at(file, include.line, from + " must not include " + to + " (" + include.target + ")"));
    }
  }
  return found;
}

std::vector<std::string> third_party_violations(const SourceFile& file) {
  std::vector<std::string> found;
  for (const Include& include : includes_of(file)) {
    for (const ThirdPartyRule& rule : kThirdPartyRules) {
      if (std::regex_match(include.target, std::regex(std::string(rule.pattern))) &&
          !std::regex_match(file.path, std::regex(std::string(rule.sources)))) {
        found.push_back(at(file, include.line, include.target + " may be included in " + std::string(rule.where)));
      }
    }
  }
  return found;
}

std::vector<std::string> durability_violations(const SourceFile& file) {
  std::vector<std::string> found;
  if (!file.path.starts_with("checkpoint/") && !file.path.starts_with("trainer/")) return found;
  for (std::size_t i = 0; i < file.lines.size(); ++i)
    if (file.lines[i].find("create_directories") != std::string::npos)
      found.push_back(
          at(file, i + 1, "create_directories syncs nothing; use make_directories_durably (core/file.hpp)"));
  return found;
}

std::vector<std::string> leftover_violations(const SourceFile& file) {
  // In pieces, so that this file does not report itself.
  static const std::regex marker(std::string("\\b(TO") + "DO(?!\\(#\\d+\\))|FIX" + "ME|XX" + "X|HA" + "CK)\\b");
  std::vector<std::string> found;
  for (std::size_t i = 0; i < file.lines.size(); ++i) {
    std::smatch match;
    if (std::regex_search(file.lines[i], match, marker)) {
      found.push_back(at(file, i + 1, match.str() + " without an issue number"));
    }
    if (file.lines[i].starts_with("<<<<<<< ") || file.lines[i].starts_with(">>>>>>> ")) {
      found.push_back(at(file, i + 1, "merge conflict marker"));
    }
  }
  return found;
}

std::vector<Function> functions_of(const SourceFile& file) {
  const std::string text = without_preprocessor(code_only(file));
  std::vector<Function> found;
  std::size_t head_start = 0, line = 1, depth = 0;
  std::size_t body_depth = 0, initialiser_depth = 0;  // 0: outside of one
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (c == '{') {
      ++depth;
      const std::string head = collapsed(std::string_view(text).substr(head_start, i - head_start));
      if (body_depth == 0 && initialiser_depth == 0 && heads_initialiser(head)) {
        initialiser_depth = depth;
      } else if (body_depth == 0 && initialiser_depth == 0 && heads_function(head)) {
        body_depth = depth;
        found.push_back({.head = head, .line = line});
      }
    }
    if (c == '}') {
      if (body_depth == depth && body_depth != 0) {
        found.back().lines = line - found.back().line + 1;
        body_depth = 0;
      }
      if (depth > 0) --depth;
      if (initialiser_depth == depth + 1) {
        initialiser_depth = 0;
        continue;  // the head goes on up to the body
      }
    }
    if (initialiser_depth == 0 && (c == ';' || c == '{' || c == '}')) head_start = i + 1;
  }
  return found;
}

std::vector<std::string> size_violations(const SourceFile& file, const SizeLimits& limits,
                                         const std::map<std::string, std::string>& allowed) {
  std::vector<std::string> found;
  const std::size_t limit = is_header(file.path) ? limits.header : limits.source;
  if (file.lines.size() > limit && !allowed.contains(file.path)) {
    found.push_back(file.path + ": " + std::to_string(file.lines.size()) + " lines, at most " + std::to_string(limit));
  }
  for (const Function& function : functions_of(file)) {
    const std::string name = function_name(function.head);
    if (function.lines > limits.function && !allowed.contains(file.path + ": " + name)) {
      found.push_back(at(file, function.line, name + " has " + std::to_string(function.lines) + " lines, at most " +
                                                  std::to_string(limits.function)));
    }
  }
  return found;
}

}  // namespace shardtune::structure
