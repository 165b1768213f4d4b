#include "tests/trainer/thread_run.hpp"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "core/log.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/support/tiny_run.hpp"
#include "trainer/commands.hpp"

namespace shardtune::testing_support {

std::string train_on_threads(const RunOptions& options, int num_ranks, const MakeHooks& make_hooks) {
  log::set_level(log::Level::error);
  run_thread_ranks(num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    toy::WrappingCommunicator wrapped(world, make_hooks ? make_hooks(world.rank()) : toy::CommunicatorHooks{});
    EXPECT_EQ(run_train(options, wrapped), 0);
  });
  return sha256_of(options.train.output_dir + "/model/model.safetensors");
}

}  // namespace shardtune::testing_support
