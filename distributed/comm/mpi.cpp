#include "distributed/comm/mpi.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include "core/error.hpp"
#include "core/host.hpp"
#include "core/log.hpp"
#include "distributed/comm/communication_thread.hpp"
#include "distributed/comm/environment_settings.hpp"
#include "distributed/comm/layered_transport.hpp"
#include "distributed/comm/mpi_transport.hpp"
#include "distributed/comm/transport.hpp"
#include "distributed/comm/transport_communicator.hpp"

namespace shardtune {
namespace {

void return_errors(MPI_Comm communicator) {
  check_mpi(MPI_Comm_set_errhandler(communicator, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
}

std::unique_ptr<Transport> make_world_transport(EnvironmentSettings& settings, int rank) {
  std::unique_ptr<Transport> messages = make_mpi_world_transport();
  settings = agree(*messages, settings);
  LayerOptions options;
  options.use = settings.use;
  options.node = settings.ranks_per_node > 0 ? rank / settings.ranks_per_node : first_rank_on_this_node();
  if (settings.timeout.count() > 0) options.timeout = settings.timeout;
  return make_layered_transport(std::move(messages), options);
}

}  // namespace

struct MpiEnvironment::Impl {
  int rank = 0;
  int size = 1;
  std::string host;
  int uncaught_at_start = std::uncaught_exceptions();
  std::weak_ptr<CommunicationThread> thread;
  bool uses_mpi = true;
  bool has_world = false;
  std::atomic<bool> is_aborting = false;
};

// Started by a launcher that can connect ranks? Open MPI's mpirun and srun --mpi=pmix set PMIX_RANK, older ones PMI_RANK.
bool is_started_by_launcher() {
  for (const char* name : {"PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"})
    if (std::getenv(name) != nullptr) return true;
  return false;
}

MpiEnvironment::MpiEnvironment(int* argc, char*** argv) : impl_(std::make_shared<Impl>()) {
  // Alone, MPI would start a daemon of its own just to be told so: 0.2 s, and files in /tmp.
  if (!is_started_by_launcher()) {
    impl_->uses_mpi = false;
    impl_->host = host_name();
    const char* tasks = std::getenv("SLURM_NTASKS");
    const char* task = std::getenv("SLURM_PROCID");
    if (tasks != nullptr && task != nullptr && std::atoi(tasks) > 1)
      fail(ErrorKind::comm, fmt::format("Slurm started {} tasks without connecting them; use mpirun, or srun --mpi=pmix", tasks));
    return;
  }
  int is_initialized = 0;
  check_mpi(MPI_Initialized(&is_initialized), "MPI_Initialized");
  check_internal(is_initialized == 0, "MpiEnvironment: MPI is running already; one environment per process");
  // Open MPI's waits poll. With more busy threads than cores they must let others compute; a core that nobody else
  // wants comes back at once. What the user says counts.
  (void)::setenv("OMPI_MCA_mpi_yield_when_idle", "1", /*overwrite=*/0);
  int provided = MPI_THREAD_SINGLE;
  check_mpi(MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
  return_errors(MPI_COMM_WORLD);
  return_errors(MPI_COMM_SELF);
  if (provided < MPI_THREAD_SERIALIZED) {
    fail(ErrorKind::comm, fmt::format("this MPI offers thread level {} but MPI_THREAD_SERIALIZED ({}) is needed; use an MPI "
                                      "built with thread support", provided, static_cast<int>(MPI_THREAD_SERIALIZED)));
  }
  check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &impl_->rank), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &impl_->size), "MPI_Comm_size");
  std::array<char, MPI_MAX_PROCESSOR_NAME> name{};
  int length = 0;
  check_mpi(MPI_Get_processor_name(name.data(), &length), "MPI_Get_processor_name");
  impl_->host.assign(name.data(), static_cast<std::size_t>(length));
}

MpiEnvironment::~MpiEnvironment() {
  if (!impl_->uses_mpi || std::uncaught_exceptions() > impl_->uncaught_at_start || impl_->is_aborting) return;
  if (!impl_->thread.expired()) {
    log::all_ranks::error("a communicator outlives the MPI environment; MPI is not shut down");
    return;
  }
  // A failing end of MPI cannot be reported to anyone; mpirun sees a process that left without it.
  (void)MPI_Finalize();
}

int MpiEnvironment::rank() const noexcept { return impl_->rank; }
int MpiEnvironment::size() const noexcept { return impl_->size; }
std::string MpiEnvironment::host() const { return impl_->host; }

std::unique_ptr<Communicator> MpiEnvironment::world() {
  check_internal(!impl_->has_world, "MpiEnvironment::world is called once");
  EnvironmentSettings settings = read_environment_settings();
  impl_->has_world = true;
  if (impl_->size == 1) return make_self_communicator();
  auto thread = std::make_shared<CommunicationThread>();
  impl_->thread = thread;
  std::shared_ptr<Transport> transport;
  thread
      ->submit([&] {
        transport = make_world_transport(settings, impl_->rank);
        log::debug("collectives of {} ranks: {}", impl_->size, transport->describe());
      })
      .wait();
  return std::make_unique<TransportCommunicator>(std::move(transport), std::move(thread), settings.check_collectives);
}

void MpiEnvironment::abort(int exit_code) noexcept {
  if (impl_->is_aborting.exchange(true)) {
    for (;;) ::pause();  // another thread is ending the process with its own code
  }
  const int code = exit_code == 0 ? shardtune::exit_code(ErrorKind::internal) : exit_code;
  std::fflush(nullptr);
  if (impl_->size == 1) ::_exit(code);
  try {
    // MPI_Abort may be called beside the communication thread, which may be blocked inside MPI: Open MPI hands it to
    // its runtime. Should it not come back, the process ends all the same and mpirun ends the others.
    std::thread([code] {
      std::this_thread::sleep_for(std::chrono::seconds(5));
      ::_exit(code);
    }).detach();
  } catch (...) {
    ::_exit(code);
  }
  (void)MPI_Abort(MPI_COMM_WORLD, code);
  ::_exit(code);
}

}  // namespace shardtune
