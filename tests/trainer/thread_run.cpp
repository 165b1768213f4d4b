#include "tests/trainer/thread_run.hpp"

#include <filesystem>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/log.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/support/tiny_run.hpp"
#include "trainer/commands.hpp"

namespace shardtune::testing_support {
namespace fs = std::filesystem;

std::string train_on_threads(const RunOptions& options, int num_ranks, const MakeHooks& make_hooks) {
  log::set_level(log::Level::error);
  run_thread_ranks(num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    toy::WrappingCommunicator wrapped(world, make_hooks ? make_hooks(world.rank()) : toy::CommunicatorHooks{});
    EXPECT_EQ(run_train(options, wrapped), 0);
  });
  return sha256_of(options.train.output_dir + "/model/model.safetensors");
}

std::string resume_on_threads(RunOptions options, int num_ranks, std::int64_t step) {
  const std::string copy = options.train.output_dir + "_resumed";
  fs::remove_all(copy);
  fs::copy(options.train.output_dir, copy, fs::copy_options::recursive);
  for (const CheckpointInfo& info : list_checkpoints(copy))
    if (info.step > step) fs::remove_all(info.directory);
  EXPECT_EQ(list_checkpoints(copy).front().step, step);
  fs::remove_all(copy + "/model");
  fs::remove(copy + "/latest");
  options.train.output_dir = copy;
  options.train.resume_from_checkpoint = "true";
  const std::string hash = train_on_threads(options, num_ranks);
  fs::remove_all(copy);
  return hash;
}

}  // namespace shardtune::testing_support
