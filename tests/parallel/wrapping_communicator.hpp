#pragma once
// A Communicator that lets a test see every operation before it is issued, and its result when it is there.
// ProgressBoards call the first hook with "publish" and no tensor.
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "distributed/comm/communicator.hpp"

namespace shardtune::toy {

struct CommunicatorHooks {
  bool has_shared_memory = true;  // false: as a backend without; the same on all ranks
  bool is_network = false;        // what runs_on_own_cores() denies; the same on all ranks
  // `sent` may be changed: what leaves this rank is what the hook makes of it.
  std::function<void(const std::string& operation, at::Tensor sent)> before = [](const std::string&,
                                                                                 const at::Tensor&) {};
  std::function<void(const std::string& operation, at::Tensor out)> after = [](const std::string&, const at::Tensor&) {
  };
};

// Same rules as the wrapped one; split() wraps, too.
class WrappingCommunicator final : public Communicator {
 public:
  WrappingCommunicator(Communicator& inner, CommunicatorHooks hooks) : inner_(&inner), hooks_(std::move(hooks)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  bool runs_on_own_cores() const override { return !hooks_.is_network; }
  Work all_reduce(at::Tensor tensor, ReduceOp op) override {
    return wrap("all_reduce", tensor, tensor, [&] { return inner_->all_reduce(tensor, op); });
  }
  Work all_gather(at::Tensor out, at::Tensor in, Counts counts) override {
    return wrap("all_gather", in, out, [&] { return inner_->all_gather(out, in, counts); });
  }
  Work reduce_scatter(at::Tensor out, at::Tensor in, Counts counts) override {
    return wrap("reduce_scatter", in, out, [&] { return inner_->reduce_scatter(out, in, counts); });
  }
  Work all_to_all(at::Tensor out, Counts out_counts, at::Tensor in, Counts in_counts) override {
    return wrap("all_to_all", in, out, [&] { return inner_->all_to_all(out, out_counts, in, in_counts); });
  }
  Work broadcast(at::Tensor tensor, int root) override {
    return wrap("broadcast", tensor, tensor, [&] { return inner_->broadcast(tensor, root); });
  }
  void barrier() override { inner_->barrier(); }
  at::Tensor make_buffer(std::int64_t numel, at::ScalarType dtype) override {
    at::Tensor made = inner_->make_buffer(numel, dtype);
    hooks_.after("make_buffer", made);
    return made;
  }
  at::Tensor make_shared(std::int64_t numel, at::ScalarType dtype) override {
    at::Tensor made = hooks_.has_shared_memory ? inner_->make_shared(numel, dtype) : at::Tensor();
    if (made.defined()) hooks_.after("make_shared", made);
    return made;
  }
  std::unique_ptr<ProgressBoard> make_progress_board() override {
    std::unique_ptr<ProgressBoard> made = hooks_.has_shared_memory ? inner_->make_progress_board() : nullptr;
    return made ? std::make_unique<Board>(std::move(made), hooks_) : nullptr;
  }
  std::unique_ptr<Communicator> split(int color, int key) override {
    std::unique_ptr<Communicator> part = inner_->split(color, key);
    auto wrapped = std::make_unique<WrappingCommunicator>(*part, hooks_);
    wrapped->owned_ = std::move(part);
    return wrapped;
  }

 private:
  class Board final : public ProgressBoard {
   public:
    Board(std::unique_ptr<ProgressBoard> inner, const CommunicatorHooks& hooks)
        : inner_(std::move(inner)), hooks_(hooks) {}
    void publish(std::int64_t step) override {
      hooks_.before("publish", {});
      inner_->publish(step);
    }
    void wait_for_all(std::int64_t step) override { inner_->wait_for_all(step); }

   private:
    std::unique_ptr<ProgressBoard> inner_;
    CommunicatorHooks hooks_;
  };

  template <class Issue>
  Work wrap(const std::string& operation, const at::Tensor& sent, const at::Tensor& out, const Issue& issue) {
    hooks_.before(operation, sent);
    auto work = std::make_shared<Work>(issue());
    return Work([this, operation, out, work] {
      work->wait();
      hooks_.after(operation, out);
    });
  }

  Communicator* inner_;
  std::unique_ptr<Communicator> owned_;
  CommunicatorHooks hooks_;
};

}  // namespace shardtune::toy
