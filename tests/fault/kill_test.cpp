// A kill storm: a random rank, or mpirun itself, is killed at random moments and at chosen steps of the commit
// protocol; the job is started again with other ranks, plan and files until the run is done. Every start goes on from
// the newest committed checkpoint, none is ever lost, and the end has the bits of an undisturbed run.
// SHARDTUNE_KILLS (25) and SHARDTUNE_KILL_MINUTES (no limit) say how long; scripts/kill_storm is for hours of it.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/rng.hpp"
#include "tests/fault/save_watch.hpp"
#include "tests/fault/stuck_job.hpp"
#include "tests/support/job.hpp"
#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using namespace testing_support;
using Clock = std::chrono::steady_clock;

constexpr int kStepsPerLap = 300;
constexpr double kSecondsToEnd = 20;    // after a kill
constexpr double kSecondsToBegin = 60;  // until training goes on
constexpr double kSecondsToRun = 300;

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
        seed_(seed),
        random_(seed) {
    for (const auto& steps : {protocol_steps(), local_steps()})
      for (const std::string& phase : steps) hits_[phase] = 0;
  }

  // One start of the job; `is_to_be_killed` or it may run to its end.
  void start_once(bool is_to_be_killed);
  // The run is done and its result right; the next start begins a new one.
  bool has_ended_lap() const { return has_ended_lap_; }
  // Of the protocol. Those through local disks are counted only: a small part is drained before anybody can aim at it.
  bool has_hit_every_step() const {
    return std::all_of(protocol_steps().begin(), protocol_steps().end(),
                       [this](const std::string& step) { return hits_.at(step) > 0; });
  }
  int kills() const { return kills_; }
  int kills_in_saves() const;
  int starts() const { return starts_; }
  int stuck() const { return stuck_; }  // starts that did not end
  std::string summary() const;

 private:
  struct Strike {
    std::string phase;         // what the job was killed in; empty: it was not
    std::vector<pid_t> ranks;  // of the job then
  };
  std::string random_options(int num_ranks, fs::path& local_dir);
  std::string wanted_phase();
  Strike strike(Job& job, SaveWatch& watch);
  bool ends(Job& job, const SaveWatch& watch, const Strike& strike);
  void end_stuck_job(Job& job, const SaveWatch& watch, const std::string& killed_in, const std::string& story);
  void expect_nothing_lost(const SaveWatch& watch);

  const RunOptions options_;
  const std::string expected_;
  const fs::path output_dir_;
  const std::uint64_t seed_;
  PhiloxStream random_;
  std::map<std::string, int> hits_;
  int kills_ = 0, kills_of_mpirun_ = 0, laps_ = 0, right_laps_ = 0, starts_ = 0, stuck_ = 0;
  double slowest_end_ = 0;
  bool has_ended_lap_ = false;
  const Clock::time_point begin_ = Clock::now();
};

// None of these may change a bit.
std::string Storm::random_options(int num_ranks, fs::path& local_dir) {
  std::string text = random_.next_below(2) == 0 ? "--sharding ddp" : "--sharding zero3";
  text += fmt::format(" --ranks_per_file {}", 1 + random_.next_below(static_cast<std::uint64_t>(num_ranks)));
  if (random_.next_below(4) == 0) text += " --async_save false";
  if (random_.next_below(2) == 0) text += " --gradient_checkpointing";
  if (random_.next_below(3) == 0) text += " --checkpoint_compression zstd";
  if (random_.next_below(3) == 0) {
    local_dir = output_dir_.string() + ".local";
    text += fmt::format(" --checkpoint_local_dir {}", local_dir.string());
  }
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

// Kills one process of the job; does nothing when it ends before.
Storm::Strike Storm::strike(Job& job, SaveWatch& watch) {
  const std::string wanted = wanted_phase();
  if (wanted.empty()) {
    const auto end = Clock::now() + std::chrono::microseconds(random_.next_below(1'500'000));
    while (Clock::now() < end && job.is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  } else {
    // Saves may be too quick to be seen in a step: after a while any moment will do.
    const auto end = Clock::now() + std::chrono::seconds(4);
    while (watch.phase() != wanted && Clock::now() < end) {
      if (!job.is_running()) return {};
    }
  }
  const std::vector<pid_t> ranks = job.children("shardtune");
  if (ranks.empty()) return {};
  const bool kills_mpirun = random_.next_below(5) == 0;
  // The lowest pid is rank 0, which commits.
  const bool takes_first = random_.next_below(2) == 0;
  const pid_t victim =
      takes_first ? *std::min_element(ranks.begin(), ranks.end()) : ranks[random_.next_below(ranks.size())];
  // Held still, so that what is seen is what it was killed in.
  stop_process(victim);
  Strike strike{watch.phase(), ranks};
  watch.note_committed();
  if (kills_mpirun) {
    ::kill(job.pid(), SIGKILL);
    ::kill(victim, SIGCONT);
  } else {
    ::kill(victim, SIGKILL);
  }
  ++kills_;
  kills_of_mpirun_ += kills_mpirun ? 1 : 0;
  ++hits_[strike.phase];
  return strike;
}

// Waits until the job and its ranks have ended; false when they do not.
bool Storm::ends(Job& job, const SaveWatch& watch, const Strike& strike) {
  const auto begin = Clock::now();
  if (!strike.phase.empty()) {
    const bool has_ended = job.wait(kSecondsToEnd).has_value() && wait_for_end(strike.ranks, kSecondsToEnd);
    slowest_end_ = std::max(slowest_end_, seconds_since(begin));
    return has_ended;
  }
  while (!job.wait(0.1)) {
    const double seconds = seconds_since(begin);
    if (seconds > kSecondsToRun || (seconds > kSecondsToBegin && !watch.has_begun())) return false;
  }
  return true;
}

// mpirun may wait for ever when a rank dies while it is being launched. That is not ours to mend: what it hangs in is
// kept, the job is killed, and it counts. A job that hangs later is ours.
void Storm::end_stuck_job(Job& job, const SaveWatch& watch, const std::string& killed_in, const std::string& story) {
  const std::vector<pid_t> processes = descendants(::getpid());
  const fs::path evidence = fmt::format("{}.stuck-{}", output_dir_.string(), starts_);
  const std::string phase = killed_in.empty() ? watch.phase() : killed_in;
  keep_evidence(evidence, processes,
                fmt::format("start {}, killed in '{}', now '{}', SHARDTUNE_KILL_SEED={}\n{}\n", starts_, killed_in,
                            watch.phase(), seed_, story),
                output_dir_.string() + ".log");
  EXPECT_TRUE(job.kill_all()) << "a process of the job cannot be killed";
  ++stuck_;
  std::printf("start %d did not end (%s); evidence in %s\n", starts_, phase.c_str(), evidence.c_str());
  EXPECT_EQ(phase, "starting or resuming") << "the job hangs";
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
  fs::path local_dir;
  const std::string command = train_command(options_, num_ranks, random_options(num_ranks, local_dir));
  SaveWatch watch(output_dir_, kStepsPerLap, local_dir);
  const fs::path log = output_dir_.string() + ".log";
  ++starts_;
  Job job(command, log);
  const Strike strike = is_to_be_killed ? this->strike(job, watch) : Strike{};
  if (!ends(job, watch, strike)) {
    end_stuck_job(job, watch, strike.phase, command);
    expect_nothing_lost(watch);
    return;
  }
  reap_orphans();
  const int exit_code = job.wait(0).value();
  ASSERT_TRUE(exit_code == 0 || !strike.phase.empty())
      << "exit code " << exit_code << " of " << command << ": " << run_command("cat " + log.string()).output;
  expect_nothing_lost(watch);
  if (exit_code != 0) return;
  ++laps_;
  const bool is_right = sha256_of(output_dir_ / "model/model.safetensors") == expected_;
  EXPECT_TRUE(is_right) << "lap " << laps_ << " has other bits than the undisturbed run";
  right_laps_ += is_right ? 1 : 0;
  has_ended_lap_ = true;
}

int Storm::kills_in_saves() const {
  int sum = 0;
  for (const auto& [phase, count] : hits_)
    if (phase.starts_with("save")) sum += count;
  return sum;
}

std::string Storm::summary() const {
  std::string text = fmt::format(
      "{} kills ({} of mpirun, the others of a rank) in {} starts and {:.0f} s ({:.2f} s per kill); {} runs of {} "
      "steps ended, {} of them with the bits of the undisturbed one; {} kills inside saves; slowest end of a job "
      "{:.1f} "
      "s; {} starts did not end\n\n| killed in | kills |\n|---|---|\n",
      kills_, kills_of_mpirun_, starts_, seconds_since(begin_), seconds_since(begin_) / std::max(1, kills_), laps_,
      kStepsPerLap, right_laps_, kills_in_saves(), slowest_end_, stuck_);
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

TEST(SaveWatch, TellsTheStagesOfASaveThroughALocalDisk) {
  const fs::path directory = fresh_directory("save_watch_local");
  const fs::path out = directory / "out", file = directory / "local/shardtune-1/shard-00000-of-00001.h5";
  fs::create_directories(out / "checkpoint-2");
  const SaveWatch watch(out, 100, directory / "local"), blind(out, 100);
  std::ofstream(out / "resolved.cfg") << "x";
  fs::create_directories(file / "checkpoint-2");  // of the save before
  fs::create_directories(out / "checkpoint-4.partial");
  EXPECT_EQ(watch.phase(), protocol_steps()[0]);
  fs::create_directories(file / "checkpoint-4.partial");
  EXPECT_EQ(watch.phase(), local_steps()[0]);
  EXPECT_EQ(blind.phase(), protocol_steps()[0]);
  fs::rename(file / "checkpoint-4.partial", file / "checkpoint-4");
  EXPECT_EQ(watch.phase(), local_steps()[1]);
  std::ofstream(out / "checkpoint-4.partial/shard-00000-of-00001.h5.tmp") << "x";
  EXPECT_EQ(watch.phase(), local_steps()[2]);
  std::ofstream(out / "checkpoint-4.partial/manifest.json") << "x";
  EXPECT_EQ(watch.phase(), protocol_steps()[5]);
  fs::remove_all(directory);
}

TEST(StuckJob, LeavesEvidenceOfEveryProcessAndNoProcess) {
  adopt_orphans();
  const fs::path directory = fresh_directory("stuck_job");
  Job job("echo said; setsid sleep 3001 & (setsid sleep 3002 &) ; sleep 3003", directory / "log");
  // The shell, and three programs of which one has lost its parent and two have left the shell's group.
  const auto sleepers = [] {
    std::vector<pid_t> found;
    for (const pid_t process : descendants(::getpid())) {
      std::string name;
      std::ifstream(fmt::format("/proc/{}/comm", process)) >> name;
      if (name == "sleep") found.push_back(process);
    }
    return found;
  };
  for (int i = 0; i < 5000 && sleepers().size() < 3; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  const std::vector<pid_t> found = sleepers();
  ASSERT_EQ(found.size(), 3u);
  keep_evidence(directory / "evidence", descendants(::getpid()), "the story", directory / "log");
  const auto text = [&](const std::string& name) {
    std::ifstream in(directory / "evidence" / name);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  EXPECT_EQ(text("story.txt"), "the story");
  EXPECT_EQ(text("job.log"), "said\n");
  EXPECT_NE(text("ps.txt").find("sleep 3002"), std::string::npos);
  for (const pid_t process : found)
    EXPECT_NE(text(fmt::format("process-{}.txt", process)).find("State:\tS"), std::string::npos);
  EXPECT_TRUE(job.kill_all());
  EXPECT_TRUE(descendants(::getpid()).empty());
  EXPECT_EQ(job.wait(0), 128 + SIGKILL);
  fs::remove_all(directory);
}

TEST(Kill, AnyProcessAtAnyMomentLosesNoCheckpointAndNoBit) {
  const char* wanted = std::getenv("SHARDTUNE_KILLS");
  const char* minutes = std::getenv("SHARDTUNE_KILL_MINUTES");
  const char* seed_text = std::getenv("SHARDTUNE_KILL_SEED");
  const int num_kills = wanted != nullptr ? std::stoi(wanted) : 25;
  const double seconds = minutes != nullptr ? 60 * std::stod(minutes) : 1e12;
  const std::uint64_t seed = seed_text != nullptr ? std::stoull(seed_text) : std::random_device{}();
  std::printf("SHARDTUNE_KILL_SEED=%lu\n", seed);
  adopt_orphans();
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
  EXPECT_LE(storm.stuck(), std::max(1, storm.starts() / 100)) << "starts that do not end are no rare accident";
  if (!HasFailure() && storm.stuck() == 0) fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
