// What a job that died in the middle of a drain has left on the nodes' disks, and how the next one uses it.
#include <map>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "checkpoint/agreement.hpp"
#include "checkpoint/checkpoint_commit.hpp"
#include "checkpoint/checkpoint_directory.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/checkpoint_verify.hpp"
#include "checkpoint/local_stage.hpp"
#include "core/error.hpp"
#include "core/hash.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"

namespace shardtune {
namespace {

// A local checkpoint as the nodes hold it together. Equal on all ranks.
struct Candidate {
  std::int64_t step = 0;
  int rank_with_manifest = 0;
  std::map<std::string, int> rank_of_file;  // the lowest that sees it
};

// By the hash of the manifest: parts of different saves of one step do not mix.
std::map<std::string, Candidate> candidates_of(const std::vector<std::string>& reports) {
  std::map<std::string, Candidate> found;
  for (int rank = static_cast<int>(reports.size()) - 1; rank >= 0; --rank)
    for (const auto& copy : nlohmann::json::parse(reports[static_cast<std::size_t>(rank)])) {
      Candidate& candidate = found[copy.at("manifest").get<std::string>()];
      candidate.step = copy.at("step");
      candidate.rank_with_manifest = rank;
      for (const auto& file : copy.at("files")) candidate.rank_of_file[file.get<std::string>()] = rank;
    }
  return found;
}

std::string report_of(const std::vector<LocalStage::Copy>& copies) {
  nlohmann::json report = nlohmann::json::array();
  for (const LocalStage::Copy& copy : copies) {
    nlohmann::json files = nlohmann::json::array();
    for (const auto& file : copy.files) files.push_back(file.filename().string());
    report.push_back({{"step", copy.step}, {"manifest", to_hex(hash_bytes(copy.manifest_text))}, {"files", files}});
  }
  return report.dump();
}

std::vector<std::string> missing_files(const Manifest& manifest, const Candidate& candidate) {
  std::vector<std::string> missing;
  for (const ManifestFile& file : manifest.files)
    if (!candidate.rank_of_file.contains(file.name)) missing.push_back(file.name);
  return missing;
}

}  // namespace

// Collective. What is committed decides: only newer local ones of the same run count.
void CheckpointStore::finish_interrupted_drain() {
  if (!local_) return;
  const std::vector<LocalStage::Copy> copies = local_->find();
  std::int64_t newest = -1;
  std::string run_id;
  for (const CheckpointInfo& info : list()) {
    if (!info.is_committed) continue;
    newest = info.step;
    if (communicator_.rank() == 0) run_id = run_id_of(read_checkpoint_run_state(info.directory));
    break;
  }
  run_id = broadcast_string(communicator_, run_id, 0);
  std::map<std::int64_t, std::pair<std::string, Candidate>> by_step;
  for (auto& [hash, candidate] : candidates_of(all_gather_strings(communicator_, report_of(copies))))
    if (candidate.step > newest) by_step[candidate.step] = {hash, candidate};
  for (auto it = by_step.rbegin(); it != by_step.rend(); ++it) {
    const auto& [hash, candidate] = it->second;
    const LocalStage::Copy* mine = nullptr;
    for (const LocalStage::Copy& copy : copies)
      if (to_hex(hash_bytes(copy.manifest_text)) == hash) mine = &copy;
    const std::string text =
        broadcast_string(communicator_, mine != nullptr ? mine->manifest_text : "", candidate.rank_with_manifest);
    const Manifest manifest = parse_manifest(text, "manifest.json");
    const std::vector<std::string> missing = missing_files(manifest, candidate);
    if (newest >= 0 && run_id_of(manifest.run) != run_id) {
      log::warn("the local disks hold checkpoint-{} of another run; it is left out", it->first);
    } else if (!missing.empty()) {
      log::warn("the local disks hold checkpoint-{}, but {} on none of this job's nodes; it is left out", it->first,
                fmt::join(missing, ", "));
    } else {
      std::vector<std::pair<std::filesystem::path, ManifestFile>> to_drain;
      for (const ManifestFile& file : manifest.files) {
        if (candidate.rank_of_file.at(file.name) != communicator_.rank()) continue;
        for (const auto& path : mine->files)
          if (path.filename() == file.name) to_drain.emplace_back(path.parent_path(), file);
      }
      if (drain_and_publish(it->first, text, to_drain)) return;
    }
  }
}

// Collective. False, with a warning, when the local copy is damaged. When it is whole and only cannot be written to the
// output directory now, that is Error{io}: going on without it would lose it for a disk that is full for a minute.
bool CheckpointStore::drain_and_publish(std::int64_t step, const std::string& manifest_text,
                                        const std::vector<std::pair<std::filesystem::path, ManifestFile>>& to_drain) {
  const std::string what = fmt::format("draining checkpoint-{} from the local disks", step);
  const std::filesystem::path partial = partial_path(output_dir_, step);
  const bool is_root = communicator_.rank() == 0;
  try {
    run_agreed(communicator_, what, [&] {
      for (const auto& [directory, file] : to_drain)
        if (const std::string problem = verify_file(directory, file).problem; !problem.empty())
          fail(ErrorKind::data, problem);
    });
    run_agreed(communicator_, what, [&] {
      if (is_root) make_partial(output_dir_, partial);
    });
    run_agreed(communicator_, what, [&] {
      for (const auto& [directory, file] : to_drain) drain_file(directory, file, partial);
    });
    run_agreed(communicator_, what, [&] {
      if (!is_root) return;
      publish_manifest(output_dir_, step, manifest_text, [](const char*) {});
      write_latest(output_dir_, step);
    });
    log::info("checkpoint-{} was whole on the local disks and is committed now", step);
    return true;
  } catch (const Error& e) {
    remove_partial(e, step);
    if (e.kind() == ErrorKind::io)
      fail(ErrorKind::io,
           fmt::format("{}; the copy on the local disks is whole and stays: start again when {} can be written "
                       "to, or leave --checkpoint_local_dir out to go on from an older checkpoint",
                       e.what(), output_dir_.string()));
    if (e.kind() != ErrorKind::data) throw;
    log::warn("{}; an older checkpoint is taken", e.what());
    return false;
  }
}

}  // namespace shardtune
