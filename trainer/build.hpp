#pragma once
// The only wiring: from options to the parts of a run, shared by the subcommands. Functions are collective where they
// take a Communicator.
#include <memory>
#include <string>
#include <vector>

#include "data/dataset.hpp"
#include "data/loader.hpp"
#include "distributed/parallel/parallel_engine.hpp"
#include "trainer/evaluator.hpp"
#include "trainer/model_source.hpp"
#include "trainer/run_state.hpp"
#include "trainer/trainer.hpp"

namespace shardtune {

// Compares every option over the ranks: Error{config} on every rank naming the first option that differs, with the ranks
// and values.
void check_same_options(const RunOptions& options, Communicator& world);

DatasetOptions dataset_options(const RunOptions& options, const std::string& file, std::int64_t max_length);
std::unique_ptr<Dataset> build_dataset(const DatasetOptions& options, const std::string& task,
                                       const std::vector<std::string>& labels, const Tokenizer& tokenizer);

// Plan, precision and memory settings of the engine. Collective: hsdp asks all ranks for their node.
ParallelOptions parallel_options(const TrainOptions& train, Communicator& world);

// Collective. Sets bucket_bytes for training: as given, or as measured on this host, now or before.
void choose_bucket_size(const TrainOptions& train, Communicator& world, ParallelOptions& parallel);

// What the order of every sum of gradients depends on: "tree", or "fast, hsdp of 2 on 4 ranks".
std::string describe_reduction(const ParallelOptions& options, int num_ranks);

// Marks the parameters that --freeze names as not trainable. Error{config} for a pattern that matches nothing.
void freeze_parameters(Model& model, const std::vector<std::string>& patterns);

// A model ready for forward passes: weights loaded from wherever the source says.
struct LoadedModel {
  ModelSource source;
  std::vector<std::string> labels;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Model> model;
  std::unique_ptr<ParallelEngine> engine;
  std::int64_t max_length = 0;
};

// For evaluate, predict and score: labels come from the model.
LoadedModel load_for_inference(const RunOptions& options, Communicator& world);

LoaderOptions loader_options(const RunIdentity& identity, const Model& model);
TrainerSettings trainer_settings(const RunOptions& options, std::int64_t steps_per_epoch);

}  // namespace shardtune
