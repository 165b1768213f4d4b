#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_directory.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/output_lock.hpp"
#include "checkpoint/tools.hpp"
#include "core/error.hpp"
#include "core/file.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

// The best step according to the newest checkpoint's trainer_state.json (Hugging Face's file).
std::vector<std::int64_t> best_steps(const fs::path& checkpoint_dir) {
  const fs::path file = checkpoint_dir / "trainer_state.json";
  if (!fs::exists(file)) return {};
  const nlohmann::json state = nlohmann::json::parse(read_file(file), nullptr, false);
  if (!state.is_object() || !state.contains("best_global_step") || !state["best_global_step"].is_number_integer())
    return {};
  return {state["best_global_step"].get<std::int64_t>()};
}

}  // namespace

std::vector<std::string> prune_output_dir(const fs::path& output_dir, int keep) {
  if (keep < 1) fail(ErrorKind::config, fmt::format("--keep = {}: at least 1 is needed", keep));
  if (!fs::is_directory(output_dir)) fail(ErrorKind::data, fmt::format("{}: no such directory", output_dir.string()));
  const OutputLock lock(output_dir, "checkpoint prune", 0);
  std::vector<CheckpointInfo> before = list_checkpoints(output_dir);
  const auto good = std::find_if(before.begin(), before.end(), [](const CheckpointInfo& info) {
    return info.is_committed && verify_checkpoint(info.directory).empty();
  });
  if (good == before.end())
    fail(ErrorKind::data,
         fmt::format("{} holds no checkpoint that verifies, so nothing is deleted", output_dir.string()));
  prune_checkpoints(output_dir, good->step, keep, best_steps(good->directory));
  std::vector<std::string> deleted;
  for (const CheckpointInfo& info : before)
    if (!fs::exists(info.directory)) deleted.push_back(info.directory.filename().string());
  return deleted;
}

nlohmann::json repair_output_dir(const fs::path& output_dir) {
  if (!fs::is_directory(output_dir)) fail(ErrorKind::data, fmt::format("{}: no such directory", output_dir.string()));
  const OutputLock lock(output_dir, "checkpoint repair", 0);
  nlohmann::json removed = nlohmann::json::array(), damaged = nlohmann::json::array(), latest;
  for (const fs::path& stale : remove_stale_directories(output_dir)) removed.push_back(stale.filename().string());
  for (const CheckpointInfo& info : list_checkpoints(output_dir)) {
    std::vector<std::string> problems{info.problem};
    if (info.is_committed) problems = verify_checkpoint(info.directory);
    if (!problems.empty()) {
      damaged.push_back({{"checkpoint", info.directory.filename().string()}, {"problems", problems}});
    } else if (latest.is_null()) {
      latest = info.directory.filename().string();
      write_latest(output_dir, info.step);
    }
  }
  return {{"removed", removed}, {"latest", latest}, {"damaged", damaged}};
}

}  // namespace shardtune
