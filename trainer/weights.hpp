#pragma once
// Pretrained weights into the engine's slices, and trained weights out to Hugging Face files.
// All functions are collective.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/model_files.hpp"
#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/parallel_engine.hpp"
#include "models/model.hpp"

namespace shardtune {

struct WeightReport {
  std::vector<std::string> newly_initialized;  // parameters no file provides
  std::vector<std::string> unexpected;         // tensors of the file that the model does not use
};

// model_dir: safetensors, or a checkpoint of ours, whose names are matched like those of a file.
// Every rank reads its distinct slices only, so every byte is read once over all ranks; then ddp gathers. Parameters of
// task heads that the file lacks are initialised from `seed` as Hugging Face does. Error{data} lists tensors of another
// shape, and missing tensors that are no head.
WeightReport load_pretrained(const std::filesystem::path& model_dir, Model& model, ParallelEngine& engine, std::uint64_t seed);

// Every parameter from its initialisation rule.
void initialize_randomly(ParallelEngine& engine, std::uint64_t seed);

// Calls `write` on rank 0 with consecutive pieces of the flat fp32 parameter, in order; a piece is bounded (64 MiB), so
// no rank ever holds more of it. `select` gives the tensor cut like the master (master itself, gradient ...).
using PieceWriter = std::function<void(const at::Tensor& piece)>;
using TensorOf = std::function<at::Tensor(const ShardedParameter&)>;
void stream_parameter(Communicator& world, const ShardedParameter& parameter, const TensorOf& select, const PieceWriter& write);

// One safetensors file with a tensor per selected parameter, fp32, names sorted; parameters for which `select` gives an
// undefined tensor are left out. Written by rank 0; a failure there is Error{io} on every rank.
void export_tensors(Communicator& world, ParallelEngine& engine, const std::filesystem::path& file, const TensorOf& select);

// A Hugging Face model directory: model.safetensors, config.json, tokenizer files; replaces an older one.
void export_model(Communicator& world, ParallelEngine& engine, const std::filesystem::path& directory,
                  const CompanionFiles& companion_files);

}  // namespace shardtune
