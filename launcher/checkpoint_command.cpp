#include <algorithm>
#include <functional>
#include <iostream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/inspect.hpp"
#include "checkpoint/tools.hpp"
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
  const fs::path directory = absolute_checkpoint(path);
  for (CheckpointInfo& info : list_checkpoints(directory.parent_path()))
    if (info.directory.filename() == directory.filename()) return {info};
  const char* problem = !fs::exists(directory / "manifest.json") ? "is no committed checkpoint (no manifest.json)"
                        : directory.filename().string().starts_with("checkpoint-")
                            ? "was set aside or is unfinished, as its name says"
                            : "is a checkpoint under another name; rename it to checkpoint-<step>, the step that its manifest.json says";
  return {CheckpointInfo{.directory = directory, .problem = problem}};
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

// A checkpoint given directly, or the newest committed one of an output directory.
fs::path one_checkpoint(const fs::path& path) {
  const auto found = checkpoints_at(path);
  for (const CheckpointInfo& info : found)
    if (info.problem.empty()) return info.directory;
  fail(ErrorKind::data, found.empty() ? fmt::format("{}: no checkpoints", path.string())
                                      : fmt::format("{} {}", found.front().directory.string(), found.front().problem));
}

int inspect(const fs::path& path, const std::string& tensor) {
  const fs::path checkpoint = one_checkpoint(path);
  std::cout << (tensor.empty() ? describe_checkpoint(checkpoint) : describe_tensor(checkpoint, tensor)).dump(2) << '\n';
  return 0;
}

int diff(const fs::path& a, const fs::path& b) {
  const nlohmann::json result = diff_checkpoints(one_checkpoint(a), one_checkpoint(b));
  std::cout << result.dump(2) << '\n';
  return result["equal"] ? 0 : 1;
}

int export_model_of(const fs::path& path, const fs::path& model_dir, const CheckpointToolOptions& options) {
  if (options.format != "safetensors") fail(ErrorKind::config, fmt::format("--format = {}: use safetensors", options.format));
  const ExportOptions how{.dtype = options.dtype, .max_shard_bytes = parse_byte_size(options.max_shard_size, "max_shard_size")};
  std::cout << export_safetensors(one_checkpoint(path), model_dir, how).dump(2) << '\n';
  return 0;
}

int prune(const fs::path& path, std::int64_t keep) {
  for (const std::string& name : prune_output_dir(path, static_cast<int>(std::min<std::int64_t>(keep, 1 << 30))))
    std::cout << "deleted " << name << '\n';
  return 0;
}

int repair(const fs::path& path) {
  const nlohmann::json result = repair_output_dir(path);
  std::cout << result.dump(2) << '\n';
  return result["damaged"].empty() ? 0 : exit_code(ErrorKind::data);
}

// An action with a fixed number of paths.
struct Action {
  const char* name;
  std::size_t num_paths;
  std::function<int(const std::vector<std::string>& paths, const CheckpointToolOptions& options)> run;
};

const std::vector<Action>& actions() {
  static const std::vector<Action> all = {
      {"inspect", 1, [](const auto& paths, const auto& options) { return inspect(paths[0], options.tensor); }},
      {"diff", 2, [](const auto& paths, const auto&) { return diff(paths[0], paths[1]); }},
      {"export", 2, [](const auto& paths, const auto& options) { return export_model_of(paths[0], paths[1], options); }},
      {"import", 2,
       [](const auto& paths, const auto&) {
         std::cout << import_model(paths[0], paths[1]).dump(2) << '\n';
         return 0;
       }},
      {"reshard", 2,
       [](const auto& paths, const auto& options) {
         const auto shards = static_cast<int>(std::min<std::int64_t>(options.shards, 1 << 30));
         std::cout << reshard_checkpoint(one_checkpoint(paths[0]), paths[1], shards).string() << '\n';
         return 0;
       }},
      {"prune", 1, [](const auto& paths, const auto& options) { return prune(paths[0], options.keep); }},
      {"repair", 1, [](const auto& paths, const auto&) { return repair(paths[0]); }}};
  return all;
}

}  // namespace

int run_checkpoint(const Invocation& invocation) {
  constexpr const char* kHelp = "'shardtune checkpoint --help' shows the actions";
  if (invocation.words.size() < 2) fail(ErrorKind::config, fmt::format("checkpoint: an action and a path are needed; {}", kHelp));
  const std::string& action = invocation.words.front();
  const std::vector<std::string> paths(invocation.words.begin() + 1, invocation.words.end());
  if (action == "list" || action == "verify") {
    int code = 0;
    for (const std::string& path : paths) code = std::max(code, action == "list" ? list(path) : verify(path));
    return code;
  }
  for (const Action& known : actions()) {
    if (action != known.name) continue;
    if (paths.size() != known.num_paths)
      fail(ErrorKind::config, fmt::format("checkpoint {}: {} paths are needed, {} given; {}", action, known.num_paths, paths.size(), kHelp));
    return known.run(paths, invocation.checkpoint);
  }
  fail(ErrorKind::config, fmt::format("checkpoint {}: unknown action; {}", action, kHelp));
}

}  // namespace shardtune
