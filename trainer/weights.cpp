#include "trainer/weights.hpp"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/safetensors.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

// A tensor of a Hugging Face directory or of an imported checkpoint.
struct StoredTensor {
  std::vector<std::int64_t> shape;
  std::function<void(std::int64_t offset, const at::Tensor& into)> read;  // elements from offset on, into fp32
};

std::map<std::string, StoredTensor> stored_tensors(const fs::path& directory) {
  std::map<std::string, StoredTensor> tensors;
  if (fs::exists(directory / "manifest.json")) {
    const auto reader = std::make_shared<CheckpointReader>(directory);
    for (const ManifestTensor& tensor : reader->manifest().tensors)
      if (tensor.field == "value")
        tensors[tensor.name] = {tensor.shape, [reader, &tensor](std::int64_t offset, const at::Tensor& into) {
                                  reader->read({{&tensor, offset, into}});
                                }};
    return tensors;
  }
  for (auto& [name, entry] : read_model_headers(directory)) {
    std::vector<std::int64_t> shape = entry.shape;
    tensors[name] = {std::move(shape), [entry = std::move(entry)](std::int64_t offset, const at::Tensor& into) {
                       read_safetensors_slice(entry, offset, into);
                     }};
  }
  return tensors;
}

// Which stored tensors provide each of our parameters; several where a tied weight is stored under both names.
struct Matches {
  std::multimap<std::string, std::pair<std::string, StoredTensor>> by_parameter;  // -> name in the file, tensor
  WeightReport report;
};

Matches match_names(const fs::path& model_dir, Model& model, ParallelEngine& engine) {
  Matches matches;
  std::map<std::string, const Parameter*> known;
  for (const ShardedParameter* p : engine.parameters()) known[p->parameter->name] = p->parameter;
  std::vector<std::string> wrong_shape, missing;
  for (auto& [name_in_file, tensor] : stored_tensors(model_dir)) {
    const std::optional<std::string> name = model.map_weight_name(name_in_file);
    if (!name) continue;
    const auto it = known.find(*name);
    if (it == known.end()) {
      matches.report.unexpected.push_back(name_in_file);
    } else if (tensor.shape != it->second->shape) {
      wrong_shape.push_back(fmt::format("{}: [{}] in the file, [{}] in the model", *name, fmt::join(tensor.shape, ", "),
                                        fmt::join(it->second->shape, ", ")));
    } else {
      matches.by_parameter.emplace(*name, std::pair(name_in_file, std::move(tensor)));
    }
  }
  if (!wrong_shape.empty())
    fail(ErrorKind::data, fmt::format("{}: tensors of another shape than the model's (a head for other labels? remove it "
                                      "from the file or use the labels it was trained with): {}",
                                      model_dir.string(), fmt::join(wrong_shape, "; ")));
  for (const auto& [name, parameter] : known) {
    if (matches.by_parameter.contains(name)) continue;
    (model.is_head_parameter(name) ? matches.report.newly_initialized : missing).push_back(name);
  }
  if (!missing.empty())
    fail(ErrorKind::data, fmt::format("{}: {} tensors are missing, so these are not weights of this architecture or not all "
                                      "of them: {}{}",
                                      model_dir.string(), missing.size(),
                                      fmt::join(missing.begin(), missing.begin() + std::min<std::ptrdiff_t>(8, std::ssize(missing)), ", "),
                                      missing.size() > 8 ? ", ..." : ""));
  return matches;
}

// Runs `body` on rank 0 and shares its failure, so that every rank throws the same error.
void on_rank_zero(Communicator& world, const std::function<void()>& body) {
  std::string problem;
  if (world.rank() == 0) {
    try {
      body();
    } catch (const std::exception& e) {
      problem = e.what();
    }
  }
  problem = broadcast_string(world, problem, 0);
  if (!problem.empty()) fail(ErrorKind::io, problem);
}

}  // namespace

WeightReport load_pretrained(const fs::path& model_dir, Model& model, ParallelEngine& engine, std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  Matches matches = match_names(model_dir, model, engine);
  for (ShardedParameter* p : engine.parameters()) {
    at::Tensor slice = p->slice_of(p->master);
    if (slice.numel() == 0) continue;
    const auto [first, last] = matches.by_parameter.equal_range(p->parameter->name);
    if (first == last) initialize_slice(*p->parameter, seed, p->slice_offset(), slice);
    for (auto it = first; it != last; ++it) {
      const auto& [name_in_file, tensor] = it->second;
      at::Tensor values = it == first ? slice : at::empty_like(slice);
      tensor.read(p->slice_offset(), values);
      if (it != first && !at::equal(values, slice))
        fail(ErrorKind::data, fmt::format("{}: {} and {} are one weight of this model, but the file holds different "
                                          "values; set tie_word_embeddings to false in config.json if they belong apart",
                                          model_dir.string(), first->second.first, name_in_file));
    }
  }
  engine.weights_loaded();
  return std::move(matches.report);
}

void initialize_randomly(ParallelEngine& engine, std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  for (ShardedParameter* p : engine.parameters()) {
    at::Tensor slice = p->slice_of(p->master);
    if (slice.numel() > 0) initialize_slice(*p->parameter, seed, p->slice_offset(), slice);
  }
  engine.weights_loaded();
}

void stream_parameter(Communicator& world, const ShardedParameter& parameter, const TensorOf& select, const PieceWriter& write) {
  const at::NoGradGuard no_grad;
  constexpr std::int64_t kPiece = 16 << 20;  // elements: 64 MiB
  const at::Tensor own = parameter.slice_of(select(parameter)).to(at::kFloat);
  const std::int64_t numel = parameter.layout.numel();
  for (std::int64_t begin = 0; begin < numel; begin += kPiece) {
    const std::int64_t end = std::min(numel, begin + kPiece);
    std::vector<std::int64_t> counts;
    std::int64_t own_begin = 0;
    for (int rank = 0; rank < world.size(); ++rank) {
      const std::int64_t low = std::clamp(parameter.layout.begin(rank), begin, end);
      const std::int64_t high = std::clamp(parameter.layout.begin(rank + 1), begin, end);
      counts.push_back(high - low);
      if (rank == world.rank()) own_begin = low - parameter.slice_offset();
    }
    const std::int64_t own_count = counts[static_cast<std::size_t>(world.rank())];
    at::Tensor piece = at::empty({end - begin}, at::kFloat);
    const at::Tensor part = own_count > 0 ? own.narrow(0, own_begin, own_count).contiguous() : at::empty({0}, at::kFloat);
    world.all_gather(piece, part, counts).wait();
    if (world.rank() == 0) write(piece);
  }
}

void export_tensors(Communicator& world, ParallelEngine& engine, const fs::path& file, const TensorOf& select) {
  std::vector<const ShardedParameter*> chosen;
  for (const ShardedParameter* p : engine.parameters())
    if (select(*p).defined()) chosen.push_back(p);
  std::sort(chosen.begin(), chosen.end(), [](auto* a, auto* b) { return a->parameter->name < b->parameter->name; });
  std::optional<SafetensorsWriter> writer;
  // A failing write must not leave rank 0's peers alone in a collective: it is remembered and told at the end.
  std::string problem;
  const auto guarded = [&](const auto& body) {
    if (world.rank() != 0 || !problem.empty()) return;
    try {
      body();
    } catch (const std::exception& e) {
      problem = e.what();
    }
  };
  guarded([&] {
    std::vector<SafetensorsWriter::Item> items;
    for (const auto* p : chosen) items.push_back({p->parameter->name, "F32", p->parameter->shape});
    writer.emplace(file, std::move(items));
  });
  for (const auto* p : chosen)
    stream_parameter(engine.world(), *p, select, [&](const at::Tensor& piece) { guarded([&] { writer->write(piece); }); });
  guarded([&] { writer->commit(); });
  on_rank_zero(world, [&] {
    if (!problem.empty()) fail(ErrorKind::io, problem);
  });
}

void export_model(Communicator& world, ParallelEngine& engine, const fs::path& directory,
                  const CompanionFiles& companion_files) {
  on_rank_zero(world, [&] { make_directories_durably(directory); });
  export_tensors(world, engine, directory / "model.safetensors", [](const ShardedParameter& p) { return p.master; });
  on_rank_zero(world, [&] {
    for (const auto& [name, content] : companion_files) write_file_durably(directory / name, content);
  });
}

}  // namespace shardtune
