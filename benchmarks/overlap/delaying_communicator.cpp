#include "benchmarks/overlap/delaying_communicator.hpp"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace shardtune::benchmark {
namespace {

// Runs tasks one after another.
class Lane {
 public:
  Lane() : thread_([this] { run(); }) {}
  ~Lane() {
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  Work submit(std::function<void()> task) {
    auto packaged = std::make_shared<std::packaged_task<void()>>(std::move(task));
    auto done = std::make_shared<std::future<void>>(packaged->get_future());
    {
      const std::lock_guard lock(mutex_);
      tasks_.emplace_back([packaged] { (*packaged)(); });
    }
    changed_.notify_one();
    return Work([done] { done->get(); });
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return is_stopping_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool is_stopping_ = false;
  std::thread thread_;
};

class DelayingCommunicator final : public Communicator {
 public:
  DelayingCommunicator(Communicator& inner, std::unique_ptr<Communicator> owned, std::shared_ptr<Lane> lane,
                       Delay& delay, bool has_shared_memory)
      : inner_(inner),
        owned_(std::move(owned)),
        lane_(std::move(lane)),
        delay_(delay),
        has_shared_memory_(has_shared_memory) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  bool runs_on_own_cores() const override { return false; }
  Work all_reduce(at::Tensor tensor, ReduceOp op) override {
    const auto bytes = static_cast<std::int64_t>(tensor.nbytes());
    return issue(bytes, [this, tensor, op] { return inner_.all_reduce(tensor, op); });
  }
  Work all_gather(at::Tensor out, at::Tensor in, Counts counts) override {
    const auto bytes = static_cast<std::int64_t>(out.nbytes());
    return issue(bytes, [this, out, in, c = copy(counts)] { return inner_.all_gather(out, in, c); });
  }
  Work reduce_scatter(at::Tensor out, at::Tensor in, Counts counts) override {
    const auto bytes = static_cast<std::int64_t>(in.nbytes());
    return issue(bytes, [this, out, in, c = copy(counts)] { return inner_.reduce_scatter(out, in, c); });
  }
  Work all_to_all(at::Tensor out, Counts out_counts, at::Tensor in, Counts in_counts) override {
    const auto bytes = static_cast<std::int64_t>(std::max(in.nbytes(), out.nbytes()));
    return issue(
        bytes, [this, out, in, o = copy(out_counts), i = copy(in_counts)] { return inner_.all_to_all(out, o, in, i); });
  }
  Work broadcast(at::Tensor tensor, int root) override {
    const auto bytes = static_cast<std::int64_t>(tensor.nbytes());
    return issue(bytes, [this, tensor, root] { return inner_.broadcast(tensor, root); });
  }
  void barrier() override {
    lane_->submit([this] { inner_.barrier(); }).wait();
  }
  // Made once, before anything is measured: no delay. What ranks write into memory in common travels no further.
  at::Tensor make_buffer(std::int64_t numel, at::ScalarType dtype) override {
    at::Tensor made;
    lane_->submit([&] { made = inner_.make_buffer(numel, dtype); }).wait();
    return made;
  }
  at::Tensor make_shared(std::int64_t numel, at::ScalarType dtype) override {
    at::Tensor made;
    if (has_shared_memory_) lane_->submit([&] { made = inner_.make_shared(numel, dtype); }).wait();
    return made;
  }
  std::unique_ptr<ProgressBoard> make_progress_board() override {
    std::unique_ptr<ProgressBoard> made;
    if (has_shared_memory_) lane_->submit([&] { made = inner_.make_progress_board(); }).wait();
    return made;
  }
  std::unique_ptr<Communicator> split(int color, int key) override {
    std::unique_ptr<Communicator> part;
    lane_->submit([&] { part = inner_.split(color, key); }).wait();
    Communicator& reference = *part;
    return std::make_unique<DelayingCommunicator>(reference, std::move(part), lane_, delay_, has_shared_memory_);
  }

 private:
  static std::vector<std::int64_t> copy(Counts counts) { return {counts.begin(), counts.end()}; }

  template <class Operation>
  Work issue(std::int64_t bytes, Operation operation) {
    return lane_->submit([this, bytes, operation = std::move(operation)] {
      const double rate = delay_.bytes_per_second;
      delay_.num_bytes += bytes;
      if (rate > 0.0) {
        const auto delay = std::chrono::nanoseconds(static_cast<std::int64_t>(1e9 * static_cast<double>(bytes) / rate));
        delay_.injected_ns += delay.count();
        std::this_thread::sleep_for(delay);
      }
      operation().wait();
    });
  }

  Communicator& inner_;
  std::unique_ptr<Communicator> owned_;
  std::shared_ptr<Lane> lane_;
  Delay& delay_;
  bool has_shared_memory_;
};

}  // namespace

std::unique_ptr<Communicator> make_delaying_communicator(Communicator& inner, Delay& delay, bool has_shared_memory) {
  return std::make_unique<DelayingCommunicator>(inner, nullptr, std::make_shared<Lane>(), delay, has_shared_memory);
}

}  // namespace shardtune::benchmark
