#pragma once
// The structural rules of the project as functions over files, so that the tests can show each rule catching a planted fault.
#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "tests/structure/source_tree.hpp"

namespace shardtune::structure {

// Each returns one line per violation: "file:line: what".
std::vector<std::string> layering_violations(const SourceFile& file);
std::vector<std::string> third_party_violations(const SourceFile& file);
std::vector<std::string> leftover_violations(const SourceFile& file);
// A directory that results are written to must outlive a loss of power, its own name included.
std::vector<std::string> durability_violations(const SourceFile& file);

struct Function {
  std::string head;       // text before the opening brace, blanks collapsed
  std::size_t line = 0;   // of the opening brace, from 1
  std::size_t lines = 0;  // from the opening to the closing brace, both included
};
// Bodies at namespace or class scope (a lambda inside a function belongs to that function).
std::vector<Function> functions_of(const SourceFile& file);

struct SizeLimits {
  std::size_t header = 150;
  std::size_t source = 400;
  std::size_t function = 60;
};
// `allowed` maps "file" or "file: function name" to the reason why it may be longer.
std::vector<std::string> size_violations(const SourceFile& file, const SizeLimits& limits,
                                         const std::map<std::string, std::string>& allowed);

}  // namespace shardtune::structure
