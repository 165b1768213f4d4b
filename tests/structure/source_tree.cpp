#include "tests/structure/source_tree.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace shardtune::structure {
namespace {

namespace fs = std::filesystem;

constexpr std::array<std::string_view, 8> kLayerFolders = {"core", "kernels",    "distributed", "models",
                                                           "data", "checkpoint", "trainer",     "launcher"};

fs::path repository() {
  const char* dir = std::getenv("SHARDTUNE_SOURCE_DIR");
  if (dir == nullptr) throw std::runtime_error("SHARDTUNE_SOURCE_DIR is not set; run the test through ctest");
  return dir;
}

void collect(const fs::path& folder, const std::vector<std::string_view>& extensions, std::vector<SourceFile>& out) {
  if (!fs::exists(folder)) return;
  for (auto entry = fs::recursive_directory_iterator(folder); entry != fs::recursive_directory_iterator(); ++entry) {
    const std::string name = entry->path().filename().string();
    if (entry->is_directory() && (name == "build" || name == ".git" || name == "__pycache__")) {
      entry.disable_recursion_pending();
      continue;
    }
    const std::string extension = entry->path().extension().string();
    if (!entry->is_regular_file() || std::find(extensions.begin(), extensions.end(), extension) == extensions.end()) {
      continue;
    }
    std::ifstream stream(entry->path());
    std::ostringstream text;
    text << stream.rdbuf();
    out.push_back(make_file(fs::relative(entry->path(), repository()).generic_string(), text.str()));
  }
}

std::vector<SourceFile> sorted(std::vector<SourceFile> files) {
  if (files.empty()) throw std::runtime_error("no file found below SHARDTUNE_SOURCE_DIR");
  std::sort(files.begin(), files.end(), [](const SourceFile& a, const SourceFile& b) { return a.path < b.path; });
  return files;
}

enum class Lexer { code, line_comment, block_comment, literal, raw_string };

// A quote after a digit or hex letter separates digits (1'000) and opens nothing.
bool opens_character(const std::string& text, std::size_t at) {
  if (at == 0) return true;
  const auto before = static_cast<unsigned char>(text[at - 1]);
  return std::isalnum(before) == 0 || before == 'L' || before == 'u' || before == 'U';
}

}  // namespace

SourceFile make_file(std::string path, const std::string& text) {
  SourceFile file{std::move(path), {}};
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) file.lines.push_back(line);
  return file;
}

std::vector<SourceFile> cpp_files(bool with_tests) {
  std::vector<SourceFile> files;
  for (const std::string_view folder : kLayerFolders) collect(repository() / folder, {".hpp", ".cpp"}, files);
  if (with_tests) {
    collect(repository() / "tests", {".hpp", ".cpp"}, files);
    collect(repository() / "benchmarks", {".hpp", ".cpp"}, files);
  }
  return sorted(std::move(files));
}

std::vector<SourceFile> text_files() {
  std::vector<SourceFile> files = cpp_files(true);
  for (const std::string_view folder : kLayerFolders) collect(repository() / folder, {".txt"}, files);
  for (const std::string_view folder : {"tests", "benchmarks", "cmake", "scripts", "docs", "examples", "docker", ".ci"}) {
    collect(repository() / folder, {".txt", ".cmake", ".md", ".py", ".sh", ".cfg", ".json", ".Dockerfile", ""}, files);
  }
  return sorted(std::move(files));
}

std::vector<Include> includes_of(const SourceFile& file) {
  static const std::regex pattern(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  std::vector<Include> found;
  for (std::size_t i = 0; i < file.lines.size(); ++i) {
    std::smatch match;
    if (std::regex_search(file.lines[i], match, pattern)) {
      found.push_back({.target = match[2], .quoted = match[1] == "\"", .line = i + 1});
    }
  }
  return found;
}

std::string code_only(const SourceFile& file) {
  std::string text;
  for (const std::string& line : file.lines) text += line + "\n";
  Lexer state = Lexer::code;
  char quote = 0;
  std::string raw_end;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const std::string_view rest = std::string_view(text).substr(i);
    if (state == Lexer::code) {
      if (rest.starts_with("//")) {
        state = Lexer::line_comment;
      } else if (rest.starts_with("/*")) {
        state = Lexer::block_comment;
      } else if (rest.starts_with("R\"")) {
        raw_end = ")" + std::string(rest.substr(2, rest.find('(') - 2)) + "\"";
        state = Lexer::raw_string;
      } else if (text[i] == '"' || (text[i] == '\'' && opens_character(text, i))) {
        quote = text[i];
        state = Lexer::literal;
      }
      if (state != Lexer::code) text[i] = ' ';
      continue;
    }
    const char here = text[i];
    const bool closes_block = rest.starts_with("*/"), closes_raw = rest.starts_with(raw_end);
    if (here != '\n') text[i] = ' ';
    if (state == Lexer::line_comment && here == '\n') {
      state = Lexer::code;
    } else if (state == Lexer::block_comment && closes_block) {
      text[++i] = ' ';
      state = Lexer::code;
    } else if (state == Lexer::literal && here == '\\') {
      if (text[++i] != '\n') text[i] = ' ';
    } else if (state == Lexer::literal && (here == quote || here == '\n')) {
      state = Lexer::code;
    } else if (state == Lexer::raw_string && closes_raw) {
      std::fill_n(text.begin() + static_cast<std::ptrdiff_t>(i), raw_end.size(), ' ');
      i += raw_end.size() - 1;
      state = Lexer::code;
    }
  }
  return text;
}

bool is_header(const std::string& path) { return path.ends_with(".hpp"); }

}  // namespace shardtune::structure
