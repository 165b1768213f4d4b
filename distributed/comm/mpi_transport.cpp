#include "distributed/comm/mpi_transport.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <mpi.h>

#include "core/error.hpp"
#include "core/handle.hpp"

namespace shardtune {
namespace {

// MPI 3 counts are ints, and Open MPI 4.1 is at its best well below that limit.
constexpr std::int64_t kMaxBytesPerCall = std::int64_t{128} << 20;
// Chunks in flight in one direction.
constexpr int kWindow = 16;
constexpr int kTag = 1;

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

// Lives on the communication thread.
class MpiTransport final : public Transport {
 public:
  explicit MpiTransport(MpiCommHandle communicator, std::int64_t max_bytes_per_call = kMaxBytesPerCall)
      : communicator_(std::move(communicator)), max_bytes_per_call_(max_bytes_per_call) {
    check_mpi(MPI_Comm_set_errhandler(communicator_.get(), MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check_mpi(MPI_Comm_rank(communicator_.get(), &rank_), "MPI_Comm_rank");
    check_mpi(MPI_Comm_size(communicator_.get(), &size_), "MPI_Comm_size");
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void set_max_bytes_per_call(std::int64_t bytes) { max_bytes_per_call_ = bytes; }

  // Point to point: MPI_Alltoallv cannot address more than INT_MAX bytes in all.
  void exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) override {
    const std::vector<std::int64_t> from = offsets_of(send_bytes);
    const std::vector<std::int64_t> to = offsets_of(receive_bytes);
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
    const std::vector<std::int64_t> to = offsets_of(bytes);
    const auto own = index(rank_);
    if (to.back() <= max_bytes_per_call_) {
      const std::vector<int> counts(bytes.begin(), bytes.end());
      const std::vector<int> displacements(to.begin(), to.end() - 1);
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

  std::string describe() const override { return "MPI"; }
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
        check_mpi(
            MPI_Irecv(in.data, count, MPI_BYTE, in.rank, kTag, communicator_.get(), &requests[index(num_requests++)]),
            "MPI_Irecv");
        expected[index(num_receives)] = count;
        in.data += count;
        in.bytes -= count;
      }
      for (int sends = 0; sends < kWindow && out.bytes > 0; ++sends) {
        const int count = chunk(out.bytes);
        check_mpi(
            MPI_Isend(out.data, count, MPI_BYTE, out.rank, kTag, communicator_.get(), &requests[index(num_requests++)]),
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
      fail(ErrorKind::comm,
           fmt::format("rank {} sends {} bytes to rank {}, which expects {}", from, received, rank_, expected));
    }
  }

  MpiCommHandle communicator_;
  std::int64_t max_bytes_per_call_;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace

void check_mpi(int code, const char* call, std::source_location where) {
  if (code == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) length = 0;
  fail(ErrorKind::comm,
       fmt::format("{} failed: {} (code {})", call, std::string(text.data(), static_cast<std::size_t>(length)), code),
       where);
}

std::unique_ptr<Transport> make_mpi_world_transport() {
  MPI_Comm copy = MPI_COMM_NULL;
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &copy), "MPI_Comm_dup");
  return std::make_unique<MpiTransport>(MpiCommHandle(copy));
}

int first_rank_on_this_node() {
  MPI_Comm node = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node), "MPI_Comm_split_type");
  const MpiCommHandle owned(node);
  int rank = 0;
  check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  check_mpi(MPI_Allreduce(MPI_IN_PLACE, &rank, 1, MPI_INT, MPI_MIN, node), "MPI_Allreduce");
  return rank;
}

void limit_bytes_per_call(Transport& transport, std::int64_t max_bytes) {
  check_internal(max_bytes > 0 && max_bytes <= kMaxBytesPerCall, "limit_bytes_per_call: bad limit");
  auto* const mpi = dynamic_cast<MpiTransport*>(&transport);
  check_internal(mpi != nullptr, "limit_bytes_per_call: not an MPI transport");
  mpi->set_max_bytes_per_call(max_bytes);
}

}  // namespace shardtune
