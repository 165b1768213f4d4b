#pragma once
// What the subcommands do once options are parsed and MPI is up. Collective over `world`; each returns the process's
// exit code or throws Error. `options` has passed validate().
#include "distributed/comm/communicator.hpp"
#include "trainer/options.hpp"

namespace shardtune {

// 0, or 75 when a stop signal ended training with a committed checkpoint.
int run_train(const RunOptions& options, Communicator& world);
int run_evaluate(const RunOptions& options, const InferenceOptions& inference, Communicator& world);
int run_predict(const RunOptions& options, const InferenceOptions& inference, Communicator& world);
int run_score(const RunOptions& options, const InferenceOptions& inference, Communicator& world);

}  // namespace shardtune
