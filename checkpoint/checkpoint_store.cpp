#include "checkpoint/checkpoint_store.hpp"

#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>

#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/agreement.hpp"
#include "checkpoint/checkpoint_directory.hpp"
#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/checkpoint_verify.hpp"
#include "checkpoint/local_stage.hpp"
#include "checkpoint/manifest.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"

namespace shardtune {
namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) { return nlohmann::json(shape).dump(); }

// A network file system may show files to a node a little late.
void wait_for_files(const std::filesystem::path& directory, const Manifest& manifest) {
  using namespace std::chrono_literals;
  for (int i = 0; i < 20; ++i) {
    bool all_there = true;
    for (const ManifestFile& file : manifest.files) all_there &= std::filesystem::exists(directory / file.name);
    if (all_there) return;
    std::this_thread::sleep_for(50ms);
  }
}

void load_slices(CheckpointReader& reader, const std::filesystem::path& directory, StateView& view) {
  std::vector<CheckpointReader::Request> requests;
  for (StateSlice& slice : view.slices) {
    const ManifestTensor& tensor = reader.tensor(slice.name, slice.field);
    if (tensor.shape != slice.global_shape)
      fail(ErrorKind::data,
           fmt::format("{}: tensor '{}' has the shape {}, this model needs {}; it is a checkpoint of another model",
                       directory.string(), slice.name, shape_text(tensor.shape), shape_text(slice.global_shape)));
    requests.push_back({&tensor, slice.offset, slice.data});
  }
  reader.read(requests);
}

// A checkpoint with tensors that no rank asked for belongs to a larger model; loading a part of it silently would be
// wrong. Fields may stay unread (weights without optimizer state).
void refuse_unused_tensors(Communicator& communicator, const std::filesystem::path& directory, const Manifest& manifest,
                           const StateView& view) {
  at::Tensor is_used = at::zeros({static_cast<std::int64_t>(manifest.tensors.size())}, at::kLong);
  auto* used = is_used.data_ptr<std::int64_t>();
  for (const StateSlice& slice : view.slices)
    if (const ManifestTensor* tensor = manifest.find(slice.name, slice.field))
      used[tensor - manifest.tensors.data()] = 1;
  communicator.all_reduce(is_used, ReduceOp::max).wait();
  // Tensors are sorted by name: the fields of one name are neighbours.
  for (std::size_t i = 0; i < manifest.tensors.size();) {
    const std::string& name = manifest.tensors[i].name;
    bool any = false;
    for (; i < manifest.tensors.size() && manifest.tensors[i].name == name; ++i) any |= used[i] != 0;
    if (!any)
      fail(ErrorKind::data,
           fmt::format("{} holds the tensor '{}', which this model does not have; it is a checkpoint of another model",
                       directory.string(), name));
  }
}

// Collective: the ranks share the reading of the files; whoever finds damage tells all. What one cannot read is no
// damage.
Verdict verify_together(Communicator& communicator, const std::filesystem::path& directory) {
  const std::filesystem::path manifest_file = directory / "manifest.json";
  std::string text;
  try {
    run_agreed(communicator, "verifying " + directory.string(), [&] {
      if (communicator.rank() != 0) return;
      text = read_file(manifest_file);
      parse_manifest(text, manifest_file);
    });
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::comm) throw;
    return {e.what(), e.kind() == ErrorKind::io};
  }
  const Manifest manifest = parse_manifest(broadcast_string(communicator, text, 0), manifest_file);
  if (communicator.rank() != 0) wait_for_files(directory, manifest);
  Verdict mine;
  const auto num_ranks = static_cast<std::size_t>(communicator.size());
  for (auto i = static_cast<std::size_t>(communicator.rank()); i < manifest.files.size() && mine.problem.empty();
       i += num_ranks)
    mine = verify_file(directory, manifest.files[i]);
  Verdict of_all;
  for (const std::string& found : all_gather_strings(communicator, (mine.is_unreadable ? "?" : "!") + mine.problem)) {
    if (found.size() == 1 || (!of_all.problem.empty() && (found[0] == '?' || !of_all.is_unreadable))) continue;
    of_all = {found.substr(1), found[0] == '?'};
  }
  return of_all;
}

}  // namespace

nlohmann::json CheckpointStore::load(const std::filesystem::path& checkpoint_dir, StateView& view) {
  const bool is_root = communicator_.rank() == 0;
  const std::string what = "loading " + checkpoint_dir.string();
  std::string text;
  run_agreed(communicator_, what, [&] {
    if (!is_root) return;
    text = read_file(checkpoint_dir / "manifest.json");
    parse_manifest(text, checkpoint_dir / "manifest.json");
  });
  text = broadcast_string(communicator_, text, 0);
  CheckpointReader reader(checkpoint_dir, parse_manifest(text, checkpoint_dir / "manifest.json"));
  run_agreed(communicator_, what, [&] {
    if (!is_root) wait_for_files(checkpoint_dir, reader.manifest());
    load_slices(reader, checkpoint_dir, view);
  });
  refuse_unused_tensors(communicator_, checkpoint_dir, reader.manifest(), view);
  view.run = reader.manifest().run;
  return view.run;
}

std::vector<CheckpointInfo> CheckpointStore::list() {
  nlohmann::json shared = nlohmann::json::array();
  run_agreed(communicator_, "listing " + output_dir_.string(), [&] {
    if (communicator_.rank() != 0) return;
    for (const CheckpointInfo& info : list_checkpoints(output_dir_))
      shared.push_back({info.step, info.directory.string(), info.is_committed, info.problem, info.is_unreadable});
  });
  using ErrorHandler = nlohmann::json::error_handler_t;
  const auto list =
      nlohmann::json::parse(broadcast_string(communicator_, shared.dump(-1, ' ', false, ErrorHandler::replace), 0));
  std::vector<CheckpointInfo> infos;
  for (const auto& info : list) infos.push_back({info[0], info[1].get<std::string>(), info[2], info[3], info[4]});
  return infos;
}

std::filesystem::path CheckpointStore::newest_usable() {
  finish_interrupted_drain();
  unreadable_.clear();
  std::string last_problem;
  for (const CheckpointInfo& info : list()) {
    Verdict verdict{info.problem, info.is_unreadable};
    if (info.is_committed) verdict = verify_together(communicator_, info.directory);
    if (verdict.problem.empty()) return info.directory;
    log::warn("checkpoint-{} is skipped: {}", info.step, verdict.problem);
    if (verdict.is_unreadable) unreadable_.insert(info.step), last_problem = verdict.problem;
  }
  if (!unreadable_.empty())
    fail(ErrorKind::io,
         fmt::format("{} holds checkpoints that cannot be read now ({}) and none that can; start again when the "
                     "cause is mended, or choose another --output_dir",
                     output_dir_.string(), last_problem));
  return {};
}

void CheckpointStore::prepare_resume(std::int64_t resumed_step, const std::string& run_id) {
  run_agreed(communicator_, "preparing " + output_dir_.string(), [&] {
    if (local_) local_->clear();
    if (communicator_.rank() != 0) return;
    remove_stale_directories(output_dir_);
    for (const CheckpointInfo& info : list_checkpoints(output_dir_)) {
      if (info.step <= resumed_step) continue;
      if (unreadable_.contains(info.step))
        log::warn("checkpoint-{} stays: it could not be read, which may pass", info.step);
      else
        reject_checkpoint(info.directory, run_id);
    }
    std::error_code ignored;
    if (std::filesystem::exists(output_dir_, ignored)) fsync_path(output_dir_);
  });
}

}  // namespace shardtune
