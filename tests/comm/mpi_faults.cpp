// Started under mpirun by mpi_faults_test: one way of failing per run, named by the first argument.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <unistd.h>

#include "core/error.hpp"
#include "distributed/comm/mpi.hpp"
#include "distributed/comm/transport_seams.hpp"

namespace {

using namespace shardtune;

// More than the machine's shared memory may hold: tensors of 64 MiB, one of them in a buffer.
void reduce_large_tensors(Communicator& world) {
  const std::int64_t numel = 16 << 20;
  const at::Tensor buffer = world.make_buffer(numel, at::kFloat);
  for (const at::Tensor& large : {at::ones({numel}, at::kFloat), buffer.fill_(1)}) {
    world.all_reduce(large, ReduceOp::sum).wait();
    if (!at::equal(large, at::full({numel}, world.size(), at::kFloat))) fail(ErrorKind::internal, "a wrong sum");
  }
}

// As much shared memory as there is, in ever smaller pieces; then messages, for which Open MPI needs some of its own.
void fill_shared_memory(Communicator& world) {
  std::vector<at::Tensor> held;
  for (std::int64_t bytes = 32 << 20; bytes >= 64 << 10; bytes /= 2) {
    for (at::Tensor piece = world.make_shared(bytes, at::kByte); piece.defined();
         piece = world.make_shared(bytes, at::kByte)) {
      held.push_back(piece);
    }
  }
  if (held.empty()) fail(ErrorKind::internal, "no shared memory at all");
  const auto messages = split_with_chunk_limit(world, 64 << 20);
  const std::int64_t numel = 4 << 20;
  for (int i = 0; i < 3; ++i) {
    const at::Tensor tensor = at::ones({numel}, at::kFloat);
    messages->all_reduce(tensor, ReduceOp::sum).wait();
    if (!at::equal(tensor, at::full({numel}, world.size(), at::kFloat))) fail(ErrorKind::internal, "a wrong sum");
  }
}

int run(MpiEnvironment& environment, const std::string& fault) {
  const auto world = environment.world();
  const bool is_culprit = world->rank() == world->size() - 1;
  at::Tensor tensor = at::ones({1000}, at::kFloat);
  world->all_reduce(tensor, ReduceOp::sum).wait();
  if (fault == "none") return 0;
  if (fault == "abort") {
    if (is_culprit) environment.abort(7);
    world->barrier();  // blocks for ever
  }
  if (fault == "abort-while-communicating") {
    // The communication thread sits inside MPI when another thread ends the job.
    Work pending = world->all_reduce(tensor, ReduceOp::sum);
    if (world->rank() == 0) pending.wait();
    if (is_culprit) {
      Work never = world->all_reduce(tensor, ReduceOp::sum);
      environment.abort(7);
    }
    pending.wait();
  }
  if (fault == "die") {
    if (is_culprit) ::raise(SIGKILL);
    world->barrier();
  }
  if (fault == "hang") {
    if (is_culprit) {
      for (;;) ::pause();
    }
    world->all_reduce(tensor, ReduceOp::sum).wait();
  }
  if (fault == "fill") fill_shared_memory(*world);
  if (fault == "large") reduce_large_tensors(*world);
  if (fault == "throw") {
    // The culprit leaves with a collective under way that its peers never enter: no destructor may wait for them.
    if (is_culprit) {
      const Work never = world->all_reduce(tensor, ReduceOp::sum);
      fail(ErrorKind::data, "row 17 is broken");
    }
    while (true) world->split(world->rank() == 0 ? 0 : 1, 0);
  }
  if (fault == "mismatch") {
    if (is_culprit) {
      world->broadcast(tensor, 0).wait();
    } else {
      world->all_reduce(tensor, ReduceOp::sum).wait();
    }
  }
  if (fault == "sizes") {
    const std::int64_t sent = is_culprit ? 3 : 2;
    const std::vector<std::int64_t> out_counts(static_cast<std::size_t>(world->size()), 2);
    std::vector<std::int64_t> in_counts(out_counts);
    in_counts[0] = world->rank() == 0 ? 2 : sent;
    const at::Tensor in = at::zeros({2 * world->size() + in_counts[0] - 2}, at::kFloat);
    world->all_to_all(at::zeros({2 * world->size()}, at::kFloat), out_counts, in, in_counts).wait();
    world->barrier();
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "";
  MpiEnvironment environment(&argc, &argv);
  try {
    return run(environment, fault);
  } catch (const Error& error) {
    std::fprintf(stderr, "rank %d: %s\n", environment.rank(), error.what());
    environment.abort(exit_code(error.kind()));
  }
}
