// A rank killed at any moment: the job ends by itself in seconds, the newest committed checkpoint is whole, and the
// resumed run (at another number of ranks) ends with the bits of an undisturbed one.
// SHARDTUNE_KILLS sets the number of kills (20).
#include <signal.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <random>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/rng.hpp"
#include "tests/support/job.hpp"
#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using namespace testing_support;

constexpr int kStepsPerKill = 24;
constexpr double kSecondsToEnd = 20;

std::string train_command(const RunOptions& options, int num_ranks, int num_steps) {
  return fmt::format(
      "exec {} {} train --config_name {} --task text-classification --train_file {} --output_dir {} --sharding zero3 "
      "--per_device_train_batch_size 4 --global_batch_size 12 --learning_rate 1e-3 --max_steps {} --save_steps 2 "
      "--save_total_limit 2 --logging_steps 50 --num_threads 1 --gradient_checkpointing --log_level warn "
      "--disable_tqdm --resume_from_checkpoint auto",
      mpirun_command(num_ranks), shardtune_binary(), options.model.config_name, options.data.train_file,
      options.train.output_dir, num_steps);
}

// What the output directory shows of the commit protocol: nothing, or how far a save has come.
std::string visible_phase(const fs::path& output_dir) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(output_dir, ignored)) {
    if (!entry.path().filename().string().ends_with(".partial")) continue;
    bool has_manifest = false, has_temporary = false, has_shard = false;
    for (const auto& file : fs::directory_iterator(entry.path(), ignored)) {
      const std::string name = file.path().filename().string();
      has_manifest |= name.starts_with("manifest");
      has_temporary |= name.ends_with(".tmp");
      has_shard |= name.starts_with("shard");
    }
    if (has_manifest) return "save: writing the manifest";
    if (has_temporary) return "save: writing files";
    return has_shard ? "save: files written" : "save: begun";
  }
  return "between saves";
}

// Steps of committed checkpoints, newest last.
std::vector<int> committed_steps(const fs::path& output_dir) {
  std::vector<int> steps;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(output_dir, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("checkpoint-") && name.find('.') == std::string::npos) steps.push_back(std::stoi(name.substr(11)));
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

// Waits until the job makes checkpoints, then for a random moment, or for a random moment of a save; kills one rank.
// Returns the phase, empty when the job ended first.
std::string kill_a_rank(Job& job, const fs::path& output_dir, PhiloxStream& random, bool aim_at_save) {
  const std::vector<int> before = committed_steps(output_dir);
  while (job.is_running() && committed_steps(output_dir) == before) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::this_thread::sleep_for(std::chrono::microseconds(random.next_below(200000)));
  if (aim_at_save) {
    while (job.is_running() && visible_phase(output_dir) == "between saves") {
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random.next_below(4000)));
  }
  const std::vector<pid_t> ranks = job.children("shardtune");
  if (ranks.empty()) return "";
  const std::string phase = visible_phase(output_dir);
  ::kill(ranks[random.next_below(ranks.size())], SIGKILL);
  return phase;
}

TEST(Kill, AnyRankAtAnyMomentLosesNoCheckpointAndNoBit) {
  const char* wanted = std::getenv("SHARDTUNE_KILLS");
  const int num_kills = wanted != nullptr ? std::stoi(wanted) : 20;
  const int num_steps = kStepsPerKill * num_kills;
  const fs::path directory = fresh_directory("kill");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.output_dir = (directory / "undisturbed").string();
  const CommandResult undisturbed = run_command(train_command(options, 2, num_steps));
  ASSERT_EQ(undisturbed.exit_code, 0) << undisturbed.output;
  const std::string expected = sha256_of(directory / "undisturbed/model/model.safetensors");

  options.train.output_dir = (directory / "killed").string();
  const fs::path output_dir = options.train.output_dir;
  fs::create_directories(output_dir);
  const std::uint64_t seed = std::random_device{}();
  std::printf("seed %lu\n", seed);
  PhiloxStream random(seed);
  std::map<std::string, int> phases;
  int kills = 0, kills_in_saves = 0;
  double slowest_end = 0;
  bool is_finished = false;
  for (int start = 0; !is_finished && start < 3 * num_kills; ++start) {
    Job job(train_command(options, 1 + start % 4, num_steps), directory / "log");
    const std::vector<int> before = committed_steps(output_dir);
    const std::string phase = kills < num_kills ? kill_a_rank(job, output_dir, random, kills % 2 == 0) : "";
    const auto killed_at = std::chrono::steady_clock::now();
    const auto exit_code = job.wait(phase.empty() ? 240 : kSecondsToEnd);
    ASSERT_TRUE(exit_code.has_value()) << "the job did not end after a kill in phase '" << phase << "'";
    if (!phase.empty()) {
      ++kills;
      ++phases[phase];
      kills_in_saves += phase.starts_with("save") ? 1 : 0;
      slowest_end = std::max(slowest_end, std::chrono::duration<double>(std::chrono::steady_clock::now() - killed_at).count());
    }
    is_finished = *exit_code == 0;
    if (phase.empty() && !is_finished) FAIL() << "unexpected exit code " << *exit_code << ": " << run_command("cat " + (directory / "log").string()).output;
    const std::vector<int> steps = committed_steps(output_dir);
    ASSERT_FALSE(steps.empty());
    if (!before.empty()) {
      EXPECT_GE(steps.back(), before.back()) << "a committed checkpoint was lost";
    }
    const CommandResult verify =
        run_command(fmt::format("{} checkpoint verify {}/checkpoint-{}", shardtune_binary(), output_dir.string(), steps.back()));
    ASSERT_EQ(verify.exit_code, 0) << verify.output;
  }
  std::string summary = fmt::format("{} kills, {} inside saves, slowest end of a job {:.1f} s;", kills, kills_in_saves, slowest_end);
  for (const auto& [phase, count] : phases) summary += fmt::format(" [{}: {}]", phase, count);
  std::printf("%s\n", summary.c_str());
  ASSERT_TRUE(is_finished) << summary;
  EXPECT_EQ(kills, num_kills) << "the run ended before all kills: raise kStepsPerKill";
  EXPECT_GE(4 * kills_in_saves, kills) << summary;
  EXPECT_EQ(sha256_of(output_dir / "model/model.safetensors"), expected);
  fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
