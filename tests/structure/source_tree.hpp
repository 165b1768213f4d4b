#pragma once
// The repository as the structure tests see it: text files below SHARDTUNE_SOURCE_DIR, and what their lines include.
#include <string>
#include <vector>

namespace shardtune::structure {

struct SourceFile {
  std::string path;  // relative to the repository, '/' as separator
  std::vector<std::string> lines;
};

// Every C++ file (.hpp, .cpp) below the layers' folders and, with `with_tests`, below tests/ and benchmarks/; sorted by path.
// Throws std::runtime_error when SHARDTUNE_SOURCE_DIR is unset or holds no such file.
std::vector<SourceFile> cpp_files(bool with_tests);
// Every text file of the project (sources, scripts, CMake, Markdown, configuration); build folders are left out.
std::vector<SourceFile> text_files();

SourceFile make_file(std::string path, const std::string& text);

struct Include {
  std::string target;
  bool quoted = false;
  std::size_t line = 0;  // from 1
};
std::vector<Include> includes_of(const SourceFile& file);

// The file's text with comments, string and character literals blanked out; newlines stay where they are.
std::string code_only(const SourceFile& file);

bool is_header(const std::string& path);

}  // namespace shardtune::structure
