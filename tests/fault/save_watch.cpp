#include "tests/fault/save_watch.hpp"

#include <signal.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <system_error>
#include <thread>

#include <fmt/format.h>

namespace shardtune::testing_support {
namespace fs = std::filesystem;
namespace {

constexpr const char* kMade = "save: 1 directory made";
constexpr const char* kWriting = "save: 2 shard being written";
constexpr const char* kRenamed = "save: 3 shard renamed, no block table";
constexpr const char* kTable = "save: 4 block table written";
constexpr const char* kManifest = "save: 5 manifest being written";
constexpr const char* kSealed = "save: 6 manifest written";
constexpr const char* kCommitted = "save: 7 committed, latest is older";
constexpr const char* kLocalWriting = "save, local: 1 being written to the local disk";
constexpr const char* kLocalWhole = "save, local: 2 a part whole on the local disk, none drained";
constexpr const char* kDraining = "save, local: 3 being drained";
constexpr const char* kPruning = "save: 8 old checkpoint being removed";

fs::file_time_type modification_time(const fs::path& file) {
  std::error_code error;
  const auto time = fs::last_write_time(file, error);
  return error ? fs::file_time_type::min() : time;
}

// R: running, D: waiting for a disk, T: stopped, Z: a zombie; nothing when there is no such process.
std::optional<char> process_state(pid_t process) {
  std::ifstream stat(fmt::format("/proc/{}/stat", process));
  std::string text;
  if (!std::getline(stat, text)) return std::nullopt;
  return text.at(text.rfind(')') + 2);
}

// How far the save in this *.partial directory is.
const char* phase_of_partial(const fs::path& partial) {
  bool has_manifest = false, has_manifest_tmp = false, has_table = false, has_shard = false, has_shard_tmp = false;
  std::error_code ignored;
  for (const auto& file : fs::directory_iterator(partial, ignored)) {
    const std::string name = file.path().filename().string();
    const bool is_shard = name.starts_with("shard");
    has_manifest |= name == "manifest.json";
    has_manifest_tmp |= name.starts_with("manifest") && name != "manifest.json";
    has_table |= is_shard && name.ends_with(".xxh3");
    has_shard |= is_shard && (name.ends_with(".h5") || name.ends_with(".h5.sz"));
    has_shard_tmp |= is_shard && name.ends_with(".h5.tmp");
  }
  if (has_manifest) return kSealed;
  if (has_manifest_tmp) return kManifest;
  if (has_table) return kTable;
  if (has_shard) return kRenamed;
  return has_shard_tmp ? kWriting : kMade;
}

std::vector<fs::path> entries_of(const fs::path& directory) {
  std::vector<fs::path> entries;
  std::error_code error;
  for (auto it = fs::directory_iterator(directory, error); !error && it != fs::directory_iterator();
       it.increment(error))
    entries.push_back(it->path());
  return entries;
}

// How far the save is of which the output directory shows `phase`, when it goes through LOCAL_DIR/<job>/<file>/.
const char* phase_through_local(const char* phase, const std::string& checkpoint, const fs::path& local_dir) {
  const std::string_view shown = phase;
  if (shown == kWriting || shown == kRenamed || shown == kTable) return kDraining;
  if (shown != kMade) return phase;
  const char* found = kMade;
  for (const fs::path& job : entries_of(local_dir))
    for (const fs::path& file : entries_of(job)) {
      if (fs::exists(file / checkpoint)) return kLocalWhole;
      if (fs::exists(file / (checkpoint + ".partial"))) found = kLocalWriting;
    }
  return found;
}

int newest_committed(const fs::path& output_dir) {
  const std::vector<int> steps = committed_steps(output_dir);
  return steps.empty() ? -1 : steps.back();
}

}  // namespace

const std::vector<std::string>& local_steps() {
  static const std::vector<std::string> steps = {kLocalWriting, kLocalWhole, kDraining};
  return steps;
}

const std::vector<std::string>& protocol_steps() {
  static const std::vector<std::string> steps = {kMade,     kWriting, kRenamed,   kTable,
                                                 kManifest, kSealed,  kCommitted, kPruning};
  return steps;
}

std::vector<int> committed_steps(const fs::path& output_dir) {
  std::vector<int> steps;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(output_dir, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("checkpoint-") && name.find('.') == std::string::npos)
      steps.push_back(std::stoi(name.substr(11)));
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

SaveWatch::SaveWatch(fs::path output_dir, int last_step, fs::path local_dir)
    : output_dir_(std::move(output_dir)),
      last_step_(last_step),
      local_dir_(std::move(local_dir)),
      newest_before_(newest_committed(output_dir_)),
      newest_noted_(newest_before_),
      config_before_(modification_time(output_dir_ / "resolved.cfg")) {}

bool SaveWatch::has_begun() const { return modification_time(output_dir_ / "resolved.cfg") != config_before_; }

std::string SaveWatch::phase() const {
  if (!has_begun()) return "starting or resuming";
  fs::path partial;
  int newest = -1;
  bool is_deleting = false;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(output_dir_, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("checkpoint-")) continue;
    if (name.ends_with(".partial"))
      partial = entry.path();
    else if (name.ends_with(".deleting"))
      is_deleting = true;
    else if (name.find('.') == std::string::npos)
      newest = std::max(newest, std::stoi(name.substr(11)));
  }
  if (is_deleting) return kPruning;
  if (!partial.empty()) {
    const char* phase = phase_of_partial(partial);
    return local_dir_.empty() ? phase : phase_through_local(phase, partial.stem(), local_dir_);
  }
  std::string latest;
  std::getline(std::ifstream(output_dir_ / "latest") >> std::ws, latest);
  if (newest > newest_before_ && latest != fmt::format("checkpoint-{}", newest)) return kCommitted;
  return newest == last_step_ ? "ending" : "training, no save under way";
}

void SaveWatch::note_committed() { newest_noted_ = std::max(newest_noted_, newest_committed(output_dir_)); }

std::string SaveWatch::loss() const {
  const int newest = newest_committed(output_dir_);
  if (newest >= newest_noted_) return "";
  return fmt::format("checkpoint-{} was committed and is lost; the newest is {}", newest_noted_,
                     newest < 0 ? "none" : fmt::format("checkpoint-{}", newest));
}

void stop_process(pid_t process) {
  ::kill(process, SIGSTOP);
  for (int i = 0; i < 100; ++i) {
    const auto state = process_state(process);
    if (!state || *state == 'T' || *state == 'Z') return;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

bool wait_for_end(const std::vector<pid_t>& processes, double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (const pid_t process : processes) {
    for (auto state = process_state(process); state && *state != 'Z'; state = process_state(process)) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  return true;
}

}  // namespace shardtune::testing_support
