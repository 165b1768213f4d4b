// A kill storm: a random rank, or mpirun itself, is killed at random moments and at chosen steps of the commit
// protocol; the job is started again with other ranks, plan and files until the run is done. Every start goes on from
// the newest committed checkpoint, none is ever lost, and the end has the bits of an undisturbed run.
// SHARDTUNE_KILLS (25) and SHARDTUNE_KILL_MINUTES (no limit) say how long; scripts/kill_storm is for hours of it.
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <random>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/rng.hpp"
#include "tests/fault/save_watch.hpp"
#include "tests/support/job.hpp"
#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using namespace testing_support;
using Clock = std::chrono::steady_clock;

constexpr int kStepsPerLap = 300;
constexpr double kSecondsToEnd = 20;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string train_command(const RunOptions& options, int num_ranks, const std::string& more) {
  return fmt::format(
      "exec {} {} train --config_name {} --task text-classification --train_file {} --output_dir {} "
      "--per_device_train_batch_size 4 --global_batch_size 12 --learning_rate 1e-3 --max_steps {} --save_steps 2 "
      "--save_total_limit 2 --logging_steps 50 --num_threads 1 --log_level warn --disable_tqdm "
      "--resume_from_checkpoint auto {}",
      mpirun_command(num_ranks), shardtune_binary(), options.model.config_name, options.data.train_file,
      options.train.output_dir, kStepsPerLap, more);
}

class Storm {
 public:
  Storm(RunOptions options, std::string expected, std::uint64_t seed)
      : options_(std::move(options)),
        expected_(std::move(expected)),
        output_dir_(options_.train.output_dir),
        random_(seed) {
    for (const std::string& phase : protocol_steps()) hits_[phase] = 0;
  }

  // One start of the job; `is_to_be_killed` or it may run to its end.
  void start_once(bool is_to_be_killed);
  // The run is done and its result right; the next start begins a new one.
  bool has_ended_lap() const { return has_ended_lap_; }
  bool has_hit_every_step() const {
    return std::all_of(hits_.begin(), hits_.end(), [](const auto& hit) { return hit.second > 0; });
  }
  int kills() const { return kills_; }
  int kills_in_saves() const;
  std::string summary() const;

 private:
  std::string random_options(int num_ranks);
  std::string wanted_phase();
  std::string strike(Job& job, SaveWatch& watch, bool& killed_mpirun);
  void expect_nothing_lost(const SaveWatch& watch);

  const RunOptions options_;
  const std::string expected_;
  const fs::path output_dir_;
  PhiloxStream random_;
  std::map<std::string, int> hits_;
  int kills_ = 0, kills_of_mpirun_ = 0, laps_ = 0, starts_ = 0;
  double slowest_end_ = 0;
  bool has_ended_lap_ = false;
  const Clock::time_point begin_ = Clock::now();
};

// None of these may change a bit.
std::string Storm::random_options(int num_ranks) {
  std::string text = random_.next_below(2) == 0 ? "--sharding ddp" : "--sharding zero3";
  text += fmt::format(" --ranks_per_file {}", 1 + random_.next_below(static_cast<std::uint64_t>(num_ranks)));
  if (random_.next_below(4) == 0) text += " --async_save false";
  if (random_.next_below(2) == 0) text += " --gradient_checkpointing";
  if (random_.next_below(3) == 0) text += " --checkpoint_compression zstd";
  if (random_.next_below(3) == 0) text += fmt::format(" --checkpoint_local_dir {}.local", output_dir_.string());
  return text;
}

// Two of three kills aim at the step of the protocol that was hit least, the others at any moment.
std::string Storm::wanted_phase() {
  if (kills_ % 3 == 2) return "";
  std::string wanted = protocol_steps().front();
  for (const std::string& phase : protocol_steps())
    if (hits_[phase] < hits_[wanted]) wanted = phase;
  return wanted;
}

// Kills one process of the job and returns the phase it was killed in; empty when the job ended before.
std::string Storm::strike(Job& job, SaveWatch& watch, bool& killed_mpirun) {
  const std::string wanted = wanted_phase();
  if (wanted.empty()) {
    const auto end = Clock::now() + std::chrono::microseconds(random_.next_below(1'500'000));
    while (Clock::now() < end && job.is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  } else {
    // Saves may be too quick to be seen in a step: after a while any moment will do.
    const auto end = Clock::now() + std::chrono::seconds(4);
    while (watch.phase() != wanted && Clock::now() < end) {
      if (!job.is_running()) return "";
    }
  }
  const std::vector<pid_t> ranks = job.children("shardtune");
  if (ranks.empty()) return "";
  killed_mpirun = random_.next_below(5) == 0;
  // The lowest pid is rank 0, which commits.
  const bool takes_first = random_.next_below(2) == 0;
  const pid_t victim =
      takes_first ? *std::min_element(ranks.begin(), ranks.end()) : ranks[random_.next_below(ranks.size())];
  // Held still, so that what is seen is what it was killed in.
  stop_process(victim);
  std::string phase = watch.phase();
  watch.note_committed();
  if (killed_mpirun) {
    ::kill(job.pid(), SIGKILL);
    ::kill(victim, SIGCONT);
  } else {
    ::kill(victim, SIGKILL);
  }
  const auto killed_at = Clock::now();
  const bool has_ended = job.wait(kSecondsToEnd).has_value() && wait_for_end(ranks, kSecondsToEnd);
  EXPECT_TRUE(has_ended) << "the job did not end after a kill in phase '" << phase << "'";
  for (const pid_t rank : ranks)
    if (!has_ended) ::kill(rank, SIGKILL);
  slowest_end_ = std::max(slowest_end_, seconds_since(killed_at));
  return phase;
}

// Neither what was there before the start nor what the job had committed when it was struck.
void Storm::expect_nothing_lost(const SaveWatch& watch) {
  ASSERT_EQ(watch.loss(), "");
  const std::vector<int> steps = committed_steps(output_dir_);
  if (steps.empty()) return;
  const CommandResult verify = run_command(
      fmt::format("{} checkpoint verify {}/checkpoint-{}", shardtune_binary(), output_dir_.string(), steps.back()));
  ASSERT_EQ(verify.exit_code, 0) << verify.output;
}

void Storm::start_once(bool is_to_be_killed) {
  if (has_ended_lap_) fs::remove_all(output_dir_), fs::remove_all(output_dir_.string() + ".local");
  has_ended_lap_ = false;
  fs::create_directories(output_dir_);
  const int num_ranks = 1 + static_cast<int>(random_.next_below(5));
  const std::string more = random_options(num_ranks);
  SaveWatch watch(output_dir_, kStepsPerLap);
  const fs::path log = output_dir_.string() + ".log";
  ++starts_;
  Job job(train_command(options_, num_ranks, more), log);
  bool killed_mpirun = false;
  const std::string phase = is_to_be_killed ? strike(job, watch, killed_mpirun) : "";
  if (!phase.empty()) {
    ++kills_;
    kills_of_mpirun_ += killed_mpirun ? 1 : 0;
    ++hits_[phase];
  }
  const auto exit_code = job.wait(300);
  ASSERT_TRUE(exit_code.has_value()) << "the job hangs";
  ASSERT_TRUE(*exit_code == 0 || !phase.empty()) << "exit code " << *exit_code << " of " << num_ranks << " ranks, "
                                                 << more << ": " << run_command("cat " + log.string()).output;
  expect_nothing_lost(watch);
  if (*exit_code != 0) return;
  EXPECT_EQ(sha256_of(output_dir_ / "model/model.safetensors"), expected_) << "lap " << laps_;
  ++laps_;
  has_ended_lap_ = true;
}

int Storm::kills_in_saves() const {
  int sum = 0;
  for (const std::string& phase : protocol_steps()) sum += hits_.at(phase);
  return sum;
}

std::string Storm::summary() const {
  std::string text = fmt::format(
      "{} kills ({} of mpirun, the others of a rank) in {} starts and {:.0f} s ({:.2f} s per kill); {} runs of {} "
      "steps ended, all with the "
      "bits of the undisturbed one; {} kills inside saves; slowest end of a job {:.1f} s\n\n| killed in | kills "
      "|\n|---|---|\n",
      kills_, kills_of_mpirun_, starts_, seconds_since(begin_), seconds_since(begin_) / std::max(1, kills_), laps_,
      kStepsPerLap, kills_in_saves(), slowest_end_);
  for (const auto& [phase, count] : hits_) text += fmt::format("| {} | {} |\n", phase, count);
  return text;
}

TEST(SaveWatch, SeesTheLossOfWhatWasCommittedAfterTheStart) {
  const fs::path out = fresh_directory("save_watch");
  fs::create_directories(out / "checkpoint-10");
  SaveWatch watch(out, 100);
  fs::create_directories(out / "checkpoint-12");
  fs::create_directories(out / "checkpoint-14");
  watch.note_committed();
  EXPECT_EQ(watch.loss(), "");
  fs::remove_all(out / "checkpoint-10");  // as retention does
  EXPECT_EQ(watch.loss(), "");
  fs::rename(out / "checkpoint-14", out / "checkpoint-14.partial");
  EXPECT_EQ(watch.loss(), "checkpoint-14 was committed and is lost; the newest is checkpoint-12");
  fs::create_directories(out / "checkpoint-16");
  EXPECT_EQ(watch.loss(), "");
  fs::remove_all(out);
  EXPECT_EQ(watch.loss(), "checkpoint-14 was committed and is lost; the newest is none");
}

TEST(Kill, AnyProcessAtAnyMomentLosesNoCheckpointAndNoBit) {
  const char* wanted = std::getenv("SHARDTUNE_KILLS");
  const char* minutes = std::getenv("SHARDTUNE_KILL_MINUTES");
  const char* seed_text = std::getenv("SHARDTUNE_KILL_SEED");
  const int num_kills = wanted != nullptr ? std::stoi(wanted) : 25;
  const double seconds = minutes != nullptr ? 60 * std::stod(minutes) : 1e12;
  const std::uint64_t seed = seed_text != nullptr ? std::stoull(seed_text) : std::random_device{}();
  std::printf("SHARDTUNE_KILL_SEED=%lu\n", seed);
  const fs::path directory = fresh_directory("kill");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.output_dir = (directory / "undisturbed").string();
  const CommandResult undisturbed = run_command(train_command(options, 2, "--sharding zero3"));
  ASSERT_EQ(undisturbed.exit_code, 0) << undisturbed.output;
  const std::string expected = sha256_of(directory / "undisturbed/model/model.safetensors");

  options.train.output_dir = (directory / "killed").string();
  Storm storm(options, expected, seed);
  const auto begin = Clock::now();
  // A kill may miss the step it aims at, so a few more may be needed for the last of them.
  const auto goes_on = [&] {
    return seconds_since(begin) < seconds &&
           (storm.kills() < num_kills || (!storm.has_hit_every_step() && storm.kills() < 4 * num_kills));
  };
  while (goes_on() && !HasFailure()) {
    const int before = storm.kills();
    storm.start_once(true);
    if (storm.kills() / 50 != before / 50) std::printf("%s\n", storm.summary().c_str()), std::fflush(stdout);
  }
  while (!storm.has_ended_lap() && !HasFailure()) storm.start_once(false);
  std::printf("%s", storm.summary().c_str());
  EXPECT_TRUE(storm.has_hit_every_step() || minutes != nullptr) << "a step of the protocol was never hit";
  EXPECT_GE(4 * storm.kills_in_saves(), storm.kills());
  if (!HasFailure()) fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
