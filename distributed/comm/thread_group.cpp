#include "distributed/comm/thread_group.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include "core/error.hpp"
#include "distributed/comm/transport.hpp"
#include "distributed/comm/transport_communicator.hpp"

namespace shardtune {
namespace {

// One run_thread_ranks call. Ranks in here are those of the outermost group.
struct Job {
  explicit Job(int num_ranks) : has_left(static_cast<std::size_t>(num_ranks), false) {}

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<bool> has_left;  // the rank's body has ended
  std::exception_ptr first_error;
  std::string failure;  // empty while all is well
};

// What the ranks of one group share. All members but `job` are guarded by job->mutex, except that between two
// synchronize() calls the published buffers may be read by all.
struct Group {
  struct Published {
    const std::byte* send = nullptr;
    const std::int64_t* send_bytes = nullptr;  // one per rank
    std::int64_t bytes = 0;
    int color = 0;
    int key = 0;
    std::shared_ptr<Group> part = nullptr;  // made by the first rank of each part
    std::shared_ptr<std::byte> memory = nullptr;
  };
  Group(std::shared_ptr<Job> the_job, std::vector<int> ranks_of_job)
      : job(std::move(the_job)), members(std::move(ranks_of_job)), published(members.size()) {}

  // Blocks until all members are here. Error{comm} when a rank has failed, or when one that is missing has ended.
  void synchronize() { synchronize(/*is_interruptible=*/true); }
  // The same after the published buffers were read. Never fails: every member is on its way here, and a buffer must not
  // go away under a member that still reads it because some other rank has failed.
  void release() { synchronize(/*is_interruptible=*/false); }

  void synchronize(bool is_interruptible) {
    std::unique_lock lock(job->mutex);
    if (is_interruptible && !job->failure.empty()) fail(ErrorKind::comm, job->failure);
    const std::int64_t mine = generation;
    if (++num_arrived == static_cast<int>(members.size())) {
      num_arrived = 0;
      ++generation;
      job->changed.notify_all();
      return;
    }
    const auto have_come = [&] { return generation != mine; };
    if (!is_interruptible) return job->changed.wait(lock, have_come);
    wait(lock, have_come, [](std::size_t) { return true; });
  }

  // Blocks until all is done. Error{comm} when a rank has failed, or when one that is awaited, by its place, has ended.
  template <class IsDone, class IsAwaited>
  void wait(std::unique_lock<std::mutex>& lock, const IsDone& is_done, const IsAwaited& is_awaited) {
    std::optional<int> missing;
    job->changed.wait(lock, [&] {
      for (std::size_t place = 0; place < members.size(); ++place) {
        const bool has_left = job->has_left[static_cast<std::size_t>(members[place])];
        if (has_left && is_awaited(place) && !missing) missing = members[place];
      }
      return is_done() || !job->failure.empty() || missing;
    });
    if (is_done()) return;
    if (!job->failure.empty()) fail(ErrorKind::comm, job->failure);
    fail(ErrorKind::comm, fmt::format("thread rank {} has ended while others wait for it", *missing));
  }

  const std::shared_ptr<Job> job;
  const std::vector<int> members;  // ranks of the job, by rank in this group
  std::vector<Published> published;
  int num_arrived = 0;
  std::int64_t generation = 0;
};

void copy_bytes(std::byte* to, const std::byte* from, std::int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

class ThreadProgressBoard final : public ProgressBoard {
 public:
  // steps: one per member, zero, guarded by the job's mutex.
  ThreadProgressBoard(std::shared_ptr<Group> group, int rank, std::shared_ptr<std::int64_t> steps)
      : group_(std::move(group)), rank_(rank), steps_(std::move(steps)) {}

  void publish(std::int64_t step) override {
    const std::lock_guard lock(group_->job->mutex);
    steps_.get()[rank_] = step;
    group_->job->changed.notify_all();
  }
  void wait_for_all(std::int64_t step) override {
    std::unique_lock lock(group_->job->mutex);
    const auto is_awaited = [&](std::size_t place) { return steps_.get()[place] < step; };
    const auto is_done = [&] {
      for (std::size_t place = 0; place < group_->members.size(); ++place) {
        if (is_awaited(place)) return false;
      }
      return true;
    };
    group_->wait(lock, is_done, is_awaited);
  }

 private:
  std::shared_ptr<Group> group_;
  int rank_;
  std::shared_ptr<std::int64_t> steps_;
};

class ThreadTransport final : public Transport {
 public:
  ThreadTransport(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(group_->members.size()); }
  bool runs_on_own_cores() const override { return true; }

  void exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) override {
    publish({.send = send, .send_bytes = send_bytes.data()});
    std::string error;
    for (int r = 0; r < size(); ++r) {
      const auto& peer = at(r);
      const std::int64_t bytes = peer.send_bytes[rank_];
      if (bytes != receive_bytes[static_cast<std::size_t>(r)]) {
        error = fmt::format("rank {} sends {} bytes to rank {}, which expects {}", r, bytes, rank_,
                            receive_bytes[static_cast<std::size_t>(r)]);
        break;
      }
      const std::byte* from = peer.send;
      for (int before = 0; before < rank_; ++before) from += peer.send_bytes[before];
      copy_bytes(receive, from, bytes);
      receive += bytes;
    }
    release(error);
  }

  void all_gather(const std::byte* send, std::byte* receive, Counts bytes) override {
    publish({.send = send, .bytes = bytes[static_cast<std::size_t>(rank_)]});
    std::string error;
    for (int r = 0; r < size() && error.empty(); ++r) {
      error = difference(r, bytes[static_cast<std::size_t>(r)]);
      if (error.empty()) copy_bytes(receive, at(r).send, bytes[static_cast<std::size_t>(r)]);
      receive += bytes[static_cast<std::size_t>(r)];
    }
    release(error);
  }

  void broadcast(std::byte* data, std::int64_t bytes, int root) override {
    publish({.send = data, .bytes = bytes});
    const std::string error = difference(root, bytes);
    if (error.empty()) copy_bytes(data, at(root).send, bytes);
    release(error);
  }

  std::shared_ptr<std::byte> make_shared(std::int64_t bytes) override {
    constexpr std::int64_t kAlignment = 64;
    Group::Published mine;
    if (rank_ == 0) {
      const auto whole = static_cast<std::size_t>((bytes + kAlignment - 1) / kAlignment * kAlignment);
      auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, whole));
      mine.memory = std::shared_ptr<std::byte>(memory, [](std::byte* data) { std::free(data); });
    }
    publish(std::move(mine));
    std::shared_ptr<std::byte> memory = at(0).memory;
    group_->release();
    group_->published[static_cast<std::size_t>(rank_)].memory.reset();
    return memory;
  }

  std::unique_ptr<ProgressBoard> make_progress_board() override {
    const std::shared_ptr<std::byte> memory = make_shared(size() * static_cast<std::int64_t>(sizeof(std::int64_t)));
    const std::shared_ptr<std::int64_t> steps(memory, reinterpret_cast<std::int64_t*>(memory.get()));
    steps.get()[rank_] = 0;
    barrier();
    return std::make_unique<ThreadProgressBoard>(group_, rank_, steps);
  }

  std::string describe() const override { return "threads"; }
  void barrier() override { group_->synchronize(); }

  std::unique_ptr<Transport> split(int color, int key) override {
    publish({.color = color, .key = key});
    std::vector<std::tuple<int, int>> order;  // (key, rank in this group) of this rank's part
    for (int r = 0; r < size(); ++r) {
      if (at(r).color == color) order.emplace_back(at(r).key, r);
    }
    std::sort(order.begin(), order.end());
    const int leader = std::get<1>(order.front());
    if (leader == rank_) {
      std::vector<int> members;
      for (const auto& [unused, r] : order) members.push_back(group_->members[static_cast<std::size_t>(r)]);
      group_->published[static_cast<std::size_t>(rank_)].part = std::make_shared<Group>(group_->job, members);
    }
    group_->release();
    auto part = at(leader).part;
    const auto place = std::find(order.begin(), order.end(), std::tuple(key, rank_)) - order.begin();
    group_->release();
    if (leader == rank_) group_->published[static_cast<std::size_t>(rank_)].part.reset();
    return std::make_unique<ThreadTransport>(std::move(part), static_cast<int>(place));
  }

 private:
  const Group::Published& at(int r) const { return group_->published[static_cast<std::size_t>(r)]; }

  void publish(Group::Published mine) {
    group_->published[static_cast<std::size_t>(rank_)] = std::move(mine);
    group_->synchronize();
  }

  // Errors found while others may read this rank's buffers are thrown once all have finished reading.
  void release(const std::string& error) {
    group_->release();
    if (!error.empty()) fail(ErrorKind::comm, error);
  }

  std::string difference(int r, std::int64_t expected) const {
    if (at(r).bytes == expected) return {};
    return fmt::format("rank {} brings {} bytes, rank {} expects {}", r, at(r).bytes, rank_, expected);
  }

  std::shared_ptr<Group> group_;
  int rank_;
};

// Thread ranks block anyway, so an operation runs where it is submitted.
class InlineExecutor final : public Executor {
 public:
  Work submit(std::function<void()> operation) override {
    operation();
    return {};
  }
  void dispose(std::shared_ptr<Transport> /*transport*/) noexcept override {}
};

void run_rank(const std::shared_ptr<Group>& world, int rank, const std::function<void(Communicator&)>& body) {
  Job& job = *world->job;
  try {
    at::init_num_threads();
    // The guard costs these ranks little and turns a mismatch, which mostly shows as a hang, into a message.
    TransportCommunicator communicator(std::make_shared<ThreadTransport>(world, rank), std::make_shared<InlineExecutor>(),
                                       /*check_collectives=*/true);
    body(communicator);
  } catch (const std::exception& e) {
    const std::lock_guard lock(job.mutex);
    if (!job.first_error) {
      job.first_error = std::current_exception();
      job.failure = fmt::format("thread rank {} has failed: {}", rank, e.what());
    }
  } catch (...) {
    const std::lock_guard lock(job.mutex);
    if (!job.first_error) {
      job.first_error = std::current_exception();
      job.failure = fmt::format("thread rank {} has failed", rank);
    }
  }
  const std::lock_guard lock(job.mutex);
  job.has_left[static_cast<std::size_t>(rank)] = true;
  job.changed.notify_all();
}

}  // namespace

void run_thread_ranks(int num_ranks, const std::function<void(Communicator&)>& body) {
  if (num_ranks < 1) fail(ErrorKind::internal, fmt::format("run_thread_ranks: {} ranks", num_ranks));
  auto job = std::make_shared<Job>(num_ranks);
  std::vector<int> members;
  for (int rank = 0; rank < num_ranks; ++rank) members.push_back(rank);
  const auto world = std::make_shared<Group>(job, members);
  std::vector<std::jthread> threads;
  try {
    for (int rank = 0; rank < num_ranks; ++rank) {
      threads.emplace_back([&world, &body, rank] { run_rank(world, rank, body); });
    }
  } catch (const std::exception& e) {
    const std::lock_guard lock(job->mutex);
    if (!job->first_error) job->first_error = std::current_exception();
    job->failure = fmt::format("cannot start thread rank {}: {}", threads.size(), e.what());
    job->changed.notify_all();
  }
  threads.clear();  // joins
  if (job->first_error) std::rethrow_exception(job->first_error);
}

}  // namespace shardtune
