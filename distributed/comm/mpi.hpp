#pragma once
// MPI as launcher and transport. The only place that knows MPI; its headers stay in mpi*.cpp.
#include <memory>
#include <string>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

// Owns MPI from MPI_Init_thread to MPI_Finalize. Construct first in main, destroy last, from the same thread.
// Started without mpirun it is a job of one rank.
class MpiEnvironment {
 public:
  MpiEnvironment(int* argc, char*** argv);  // Error{comm} when MPI cannot start or lacks MPI_THREAD_SERIALIZED
  // Finalizes MPI unless an exception is in flight: then peers may be blocked and only abort() ends the job.
  ~MpiEnvironment();
  MpiEnvironment(const MpiEnvironment&) = delete;
  MpiEnvironment& operator=(const MpiEnvironment&) = delete;

  int rank() const noexcept;
  int size() const noexcept;
  std::string host() const;

  // The communicator of all ranks. From its creation until its destruction only its operations call MPI, in program
  // order, on the communication thread or on a thread that waits for them (Open MPI 4.1 makes no progress outside MPI
  // calls). Ranks of one machine use shared memory where the system allows it. Counts above INT_MAX are chunked;
  // MPI_ERRORS_RETURN is set. docs/collectives.md has the environment variables. Call once.
  std::unique_ptr<Communicator> world();

  // Ends the whole job with this exit code, from any thread, without waiting for peers.
  [[noreturn]] void abort(int exit_code) noexcept;

  struct Impl;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace shardtune
