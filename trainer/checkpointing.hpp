#pragma once
// Between a run and its checkpoints: which slices are saved, how a run is found again. All functions are collective.
#include <filesystem>
#include <string>
#include <vector>

#include "checkpoint/checkpoint_store.hpp"
#include "distributed/parallel/parallel_engine.hpp"
#include "trainer/optimizer.hpp"
#include "trainer/options.hpp"
#include "trainer/run_state.hpp"

namespace shardtune {

// This rank's distinct slices of masters and, with an optimizer, of its state. The tensors are views: loading into
// them loads this rank's part of the run.
StateView make_state_view(ParallelEngine& engine, Optimizer* optimizer);

// Loads values (and optimizer state) and makes them whole under ddp. Returns the run state stored in the checkpoint.
nlohmann::json load_checkpoint(CheckpointStore& store, const std::filesystem::path& directory, ParallelEngine& engine,
                               Optimizer* optimizer);

// What --resume_from_checkpoint, --overwrite_output_dir and the content of output_dir mean together: the checkpoint
// directory to resume from, empty for a fresh start. Error{config} for an output directory that holds checkpoints
// without either option, and for "true" without a checkpoint.
std::filesystem::path find_resume_checkpoint(const TrainOptions& options, CheckpointStore& store);

// trainer_state.json as Hugging Face's TrainerState reads it.
std::string hf_trainer_state(const RunState& state, const RunOptions& options, std::int64_t max_steps, std::int64_t steps_per_epoch);

}  // namespace shardtune
