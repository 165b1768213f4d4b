#pragma once
// --config FILE: `name = value` lines, or a .json object with the same names. docs/formats.md has the grammar.
#include <filesystem>
#include <string>
#include <vector>

namespace shardtune {

struct ConfigEntry {
  std::string name;   // as written, not yet looked up
  std::string value;  // quotes removed; JSON arrays joined by commas
  std::string where;  // "run.cfg:12" or "run.json: learning_rate", for messages
};

// Lines: a '#' at the start of a line or after a space begins a comment; a value may stand in single or double quotes, in
// which case everything between them counts. Blank lines are skipped.
// Error{config} for a missing or malformed file and for a name given twice; it names the file, and the line where there
// is one.
std::vector<ConfigEntry> read_config_file(const std::filesystem::path& file);

}  // namespace shardtune
