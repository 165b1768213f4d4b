#include "distributed/comm/mpi.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <source_location>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include "core/error.hpp"
#include "core/host.hpp"
#include "core/handle.hpp"
#include "core/log.hpp"
#include "distributed/comm/communication_thread.hpp"
#include "distributed/comm/mpi_internal.hpp"
#include "distributed/comm/transport.hpp"
#include "distributed/comm/transport_communicator.hpp"

namespace shardtune {
namespace {

// MPI 3 counts are ints, and Open MPI 4.1 is at its best well below that limit.
constexpr std::int64_t kMaxBytesPerCall = std::int64_t{128} << 20;
// Chunks in flight in one direction.
constexpr int kWindow = 16;
constexpr int kTag = 1;

void check_mpi(int code, const char* call, std::source_location where = std::source_location::current()) {
  if (code == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) length = 0;
  fail(ErrorKind::comm,
       fmt::format("{} failed: {} (code {})", call, std::string(text.data(), static_cast<std::size_t>(length)), code), where);
}

struct MpiCommTraits {
  static MPI_Comm null() noexcept { return MPI_COMM_NULL; }
  static void destroy(MPI_Comm communicator) noexcept {
    int is_finalized = 0;
    // Nothing can be done about a failure here, and the job is about to end.
    (void)MPI_Finalized(&is_finalized);
    if (is_finalized == 0) (void)MPI_Comm_free(&communicator);
  }
};
using MpiCommHandle = UniqueHandle<MPI_Comm, MpiCommTraits>;

void return_errors(MPI_Comm communicator) {
  check_mpi(MPI_Comm_set_errhandler(communicator, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
}

// Lives on the communication thread.
class MpiTransport final : public Transport {
 public:
  explicit MpiTransport(MpiCommHandle communicator, std::int64_t max_bytes_per_call = kMaxBytesPerCall)
      : communicator_(std::move(communicator)), max_bytes_per_call_(max_bytes_per_call) {
    return_errors(communicator_.get());
    check_mpi(MPI_Comm_rank(communicator_.get(), &rank_), "MPI_Comm_rank");
    check_mpi(MPI_Comm_size(communicator_.get(), &size_), "MPI_Comm_size");
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void set_max_bytes_per_call(std::int64_t bytes) { max_bytes_per_call_ = bytes; }

  // Point to point: MPI_Alltoallv cannot address more than INT_MAX bytes in all.
  void exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) override {
    const std::vector<std::int64_t> from = offsets(send_bytes);
    const std::vector<std::int64_t> to = offsets(receive_bytes);
    const auto own = index(rank_);
    copy_own(receive + to[own], send + from[own], send_bytes[own]);
    for (int step = 1; step < size_; ++step) {
      const int next = (rank_ + step) % size_;
      const int previous = (rank_ - step + size_) % size_;
      swap({next, send + from[index(next)], send_bytes[index(next)]},
           {previous, receive + to[index(previous)], receive_bytes[index(previous)]});
    }
  }

  void all_gather(const std::byte* send, std::byte* receive, Counts bytes) override {
    const std::vector<std::int64_t> to = offsets(bytes);
    const auto own = index(rank_);
    if (to.back() + bytes.back() <= max_bytes_per_call_) {
      const std::vector<int> counts(bytes.begin(), bytes.end());
      const std::vector<int> displacements(to.begin(), to.end());
      const void* source = send == receive + to[own] ? MPI_IN_PLACE : send;
      check_mpi(MPI_Allgatherv(source, counts[own], MPI_BYTE, receive, counts.data(), displacements.data(), MPI_BYTE,
                               communicator_.get()),
                "MPI_Allgatherv");
      return;
    }
    copy_own(receive + to[own], send, bytes[own]);
    for (int step = 1; step < size_; ++step) {
      const int next = (rank_ + step) % size_;
      const int previous = (rank_ - step + size_) % size_;
      swap({next, send, bytes[own]}, {previous, receive + to[index(previous)], bytes[index(previous)]});
    }
  }

  void broadcast(std::byte* data, std::int64_t bytes, int root) override {
    for (std::int64_t done = 0; done < bytes; done += max_bytes_per_call_) {
      const int count = static_cast<int>(std::min(max_bytes_per_call_, bytes - done));
      check_mpi(MPI_Bcast(data + done, count, MPI_BYTE, root, communicator_.get()), "MPI_Bcast");
    }
  }

  void barrier() override { check_mpi(MPI_Barrier(communicator_.get()), "MPI_Barrier"); }

  std::unique_ptr<Transport> split(int color, int key) override {
    MPI_Comm part = MPI_COMM_NULL;
    check_mpi(MPI_Comm_split(communicator_.get(), color, key, &part), "MPI_Comm_split");
    return std::make_unique<MpiTransport>(MpiCommHandle(part), max_bytes_per_call_);
  }

 private:
  struct Outgoing {
    int rank;
    const std::byte* data;
    std::int64_t bytes;
  };
  struct Incoming {
    int rank;
    std::byte* data;
    std::int64_t bytes;
  };

  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }

  static std::vector<std::int64_t> offsets(Counts bytes) {
    std::vector<std::int64_t> result;
    std::int64_t offset = 0;
    for (const std::int64_t count : bytes) {
      result.push_back(offset);
      offset += count;
    }
    return result;
  }

  static void copy_own(std::byte* to, const std::byte* from, std::int64_t bytes) {
    if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }

  int chunk(std::int64_t left) const { return static_cast<int>(std::min(left, max_bytes_per_call_)); }

  // Sends to one rank while receiving from another. Both sides cut alike, and a window waits only for the same window
  // of its two partners, so there is always a rank that can go on.
  void swap(Outgoing out, Incoming in) {
    while (out.bytes > 0 || in.bytes > 0) {
      std::array<MPI_Request, 2 * kWindow> requests;
      std::array<MPI_Status, 2 * kWindow> statuses;
      std::array<int, kWindow> expected;
      int num_requests = 0;
      int num_receives = 0;
      for (; num_receives < kWindow && in.bytes > 0; ++num_receives) {
        const int count = chunk(in.bytes);
        check_mpi(MPI_Irecv(in.data, count, MPI_BYTE, in.rank, kTag, communicator_.get(), &requests[index(num_requests++)]),
                  "MPI_Irecv");
        expected[index(num_receives)] = count;
        in.data += count;
        in.bytes -= count;
      }
      for (int sends = 0; sends < kWindow && out.bytes > 0; ++sends) {
        const int count = chunk(out.bytes);
        check_mpi(MPI_Isend(out.data, count, MPI_BYTE, out.rank, kTag, communicator_.get(),
                            &requests[index(num_requests++)]),
                  "MPI_Isend");
        out.data += count;
        out.bytes -= count;
      }
      // One by one: MPI_Waitall of Open MPI 4.1 may spin for ever when one of its requests has failed (a truncated message).
      for (int i = 0; i < num_requests; ++i) check_mpi(MPI_Wait(&requests[index(i)], &statuses[index(i)]), "MPI_Wait");
      for (int i = 0; i < num_receives; ++i) check_received(statuses[index(i)], expected[index(i)], in.rank);
    }
  }

  void check_received(const MPI_Status& status, int expected, int from) const {
    int received = 0;
    check_mpi(MPI_Get_count(&status, MPI_BYTE, &received), "MPI_Get_count");
    if (received != expected) {
      fail(ErrorKind::comm, fmt::format("rank {} sends {} bytes to rank {}, which expects {}", from, received, rank_, expected));
    }
  }

  MpiCommHandle communicator_;
  std::int64_t max_bytes_per_call_;
  int rank_ = 0;
  int size_ = 1;
};

// Debug level: SHARDTUNE_CHECK_COLLECTIVES=1 makes ranks compare operations before each of them.
bool wants_checked_collectives() {
  const char* value = std::getenv("SHARDTUNE_CHECK_COLLECTIVES");
  if (value == nullptr || std::strcmp(value, "") == 0 || std::strcmp(value, "0") == 0) return false;
  if (std::strcmp(value, "1") == 0) return true;
  fail(ErrorKind::config, fmt::format("SHARDTUNE_CHECK_COLLECTIVES is '{}'; use 0 or 1", value));
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
  bool is_checked = wants_checked_collectives();
  impl_->has_world = true;
  if (impl_->size == 1) return make_self_communicator();
  auto thread = std::make_shared<CommunicationThread>();
  impl_->thread = thread;
  std::shared_ptr<Transport> transport;
  thread->submit([&] {
    MPI_Comm copy = MPI_COMM_NULL;
    check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &copy), "MPI_Comm_dup");
    transport = std::make_shared<MpiTransport>(MpiCommHandle(copy));
    // An environment variable may reach some hosts only, and half of a guard is a hang.
    int wanted = is_checked ? 1 : 0;
    check_mpi(MPI_Allreduce(MPI_IN_PLACE, &wanted, 1, MPI_INT, MPI_MAX, copy), "MPI_Allreduce");
    is_checked = wanted != 0;
  }).wait();
  return std::make_unique<TransportCommunicator>(std::move(transport), std::move(thread), is_checked);
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

std::unique_ptr<Communicator> split_with_chunk_limit(Communicator& communicator, std::int64_t max_bytes_per_call) {
  check_internal(max_bytes_per_call > 0 && max_bytes_per_call <= kMaxBytesPerCall, "split_with_chunk_limit: bad limit");
  auto part = communicator.split(0, communicator.rank());
  if (part->size() == 1) return part;
  auto* const group = dynamic_cast<TransportCommunicator*>(part.get());
  auto* const transport = group != nullptr ? dynamic_cast<MpiTransport*>(&group->transport()) : nullptr;
  check_internal(transport != nullptr, "split_with_chunk_limit: not an MPI communicator");
  transport->set_max_bytes_per_call(max_bytes_per_call);
  return part;
}

}  // namespace shardtune
