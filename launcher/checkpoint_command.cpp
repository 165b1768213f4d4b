#include <algorithm>
#include <iostream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/inspect.hpp"
#include "core/error.hpp"
#include "launcher/offline_commands.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

// A checkpoint given directly, or those of an output directory, newest first.
std::vector<CheckpointInfo> checkpoints_at(const fs::path& path) {
  if (!fs::is_directory(path))
    fail(ErrorKind::data, fmt::format("{}: no such directory; give an output directory or a checkpoint-<step> in it", path.string()));
  const bool is_output_dir = !path.filename().string().starts_with("checkpoint-") && !fs::exists(path / "manifest.json");
  if (is_output_dir) return list_checkpoints(path);
  const fs::path absolute = fs::absolute(path).lexically_normal();
  const fs::path directory = absolute.filename().empty() ? absolute.parent_path() : absolute;
  for (CheckpointInfo& info : list_checkpoints(directory.parent_path()))
    if (info.directory.filename() == directory.filename()) return {info};
  return {CheckpointInfo{.directory = directory, .problem = "is no committed checkpoint (no manifest.json)"}};
}

int list(const fs::path& path) {
  const auto found = checkpoints_at(path);
  if (found.empty()) std::cout << fmt::format("{}: no checkpoints\n", path.string());
  for (const CheckpointInfo& info : found)
    std::cout << fmt::format("{:>8}  {}  {}\n", info.step, info.is_committed ? "committed" : "unusable ", info.directory.string() + (info.problem.empty() ? "" : ": " + info.problem));
  return 0;
}

int verify(const fs::path& path) {
  const auto found = checkpoints_at(path);
  if (found.empty()) fail(ErrorKind::data, fmt::format("{}: no checkpoints", path.string()));
  bool is_good = true;
  for (const CheckpointInfo& info : found) {
    std::vector<std::string> problems{info.problem};
    if (info.problem.empty()) problems = verify_checkpoint(info.directory);
    std::cout << fmt::format("{}: {}\n", info.directory.string(), problems.empty() ? "good" : "damaged");
    for (const std::string& problem : problems) std::cout << "  " << problem << '\n';
    is_good &= problems.empty();
  }
  return is_good ? 0 : exit_code(ErrorKind::data);
}

// The checkpoint at `path`, or the newest usable one of an output directory.
int inspect(const fs::path& path, const std::string& tensor) {
  const auto found = checkpoints_at(path);
  const auto usable = std::find_if(found.begin(), found.end(), [](const CheckpointInfo& info) { return info.problem.empty(); });
  if (usable == found.end())
    fail(ErrorKind::data, found.empty() ? fmt::format("{}: no checkpoints", path.string())
                                        : fmt::format("{} {}", found.front().directory.string(), found.front().problem));
  std::cout << (tensor.empty() ? describe_checkpoint(usable->directory) : describe_tensor(usable->directory, tensor)).dump(2) << '\n';
  return 0;
}

}  // namespace

int run_checkpoint(const Invocation& invocation) {
  const std::vector<std::string>& words = invocation.words;
  if (words.size() < 2)
    fail(ErrorKind::config, "usage: shardtune checkpoint list|verify|inspect PATH, where PATH is an output directory or a checkpoint");
  const std::string& action = words.front();
  int code = 0;
  for (std::size_t i = 1; i < words.size(); ++i) {
    if (action == "list") code = std::max(code, list(words[i]));
    else if (action == "verify") code = std::max(code, verify(words[i]));
    else if (action == "inspect") code = std::max(code, inspect(words[i], invocation.checkpoint.tensor));
    else fail(ErrorKind::config, fmt::format("checkpoint {}: unknown action; use list, verify or inspect", action));
  }
  return code;
}

}  // namespace shardtune
