#include "tests/comm/buffered_communicator.hpp"

#include <ATen/ATen.h>

namespace shardtune::conformance {
namespace {

constexpr std::int64_t kBytes = 2 << 20;

class BufferedCommunicator final : public Communicator {
 public:
  BufferedCommunicator(Communicator& inner, bool uses_buffers)
      : inner_(inner),
        uses_buffers_(uses_buffers),
        inputs_(inner.make_buffer(kBytes, at::kByte)),
        outputs_(inner.make_buffer(kBytes, at::kByte)) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  bool runs_on_own_cores() const override { return inner_.runs_on_own_cores(); }

  Work all_reduce(at::Tensor tensor, ReduceOp op) override {
    const at::Tensor staged = stage(inputs_, tensor);
    inner_.all_reduce(staged, op).wait();
    put_back(tensor, staged);
    return {};
  }
  Work all_gather(at::Tensor out, at::Tensor in, Counts counts) override {
    const at::Tensor staged_out = stage(outputs_, out);
    at::Tensor staged_in = stage(inputs_, in);
    if (is_staged(out, staged_out) && in.defined() && in.storage().data() == out.storage().data()) {
      staged_in = staged_out.narrow(0, in.storage_offset() - out.storage_offset(), in.numel());
    }
    inner_.all_gather(staged_out, staged_in, counts).wait();
    put_back(out, staged_out);
    return {};
  }
  Work reduce_scatter(at::Tensor out, at::Tensor in, Counts counts) override {
    inner_.reduce_scatter(out, stage(inputs_, in), counts).wait();
    return {};
  }
  Work all_to_all(at::Tensor out, Counts out_counts, at::Tensor in, Counts in_counts) override {
    const bool is_aliased = out.is_same(in);
    const at::Tensor staged_out = is_aliased ? out : stage(outputs_, out);
    inner_.all_to_all(staged_out, out_counts, is_aliased ? in : stage(inputs_, in), in_counts).wait();
    put_back(out, staged_out);
    return {};
  }
  Work broadcast(at::Tensor tensor, int root) override {
    const at::Tensor staged = stage(inputs_, tensor);
    inner_.broadcast(staged, root).wait();
    put_back(tensor, staged);
    return {};
  }
  void barrier() override { inner_.barrier(); }
  at::Tensor make_buffer(std::int64_t numel, at::ScalarType dtype) override { return inner_.make_buffer(numel, dtype); }
  std::unique_ptr<Communicator> split(int color, int key) override { return inner_.split(color, key); }

 private:
  at::Tensor stage(const at::Tensor& buffer, const at::Tensor& tensor) const {
    if (!uses_buffers_ || !tensor.defined() || !tensor.is_contiguous() || tensor.dim() != 1 || tensor.numel() == 0 ||
        tensor.nbytes() > kBytes) {
      return tensor;
    }
    const at::Tensor staged =
        buffer.narrow(0, 0, static_cast<std::int64_t>(tensor.nbytes())).view(tensor.scalar_type());
    staged.copy_(tensor);
    return staged;
  }
  static bool is_staged(const at::Tensor& tensor, const at::Tensor& staged) { return !staged.is_same(tensor); }
  static void put_back(const at::Tensor& tensor, const at::Tensor& staged) {
    if (is_staged(tensor, staged)) tensor.copy_(staged);
  }

  Communicator& inner_;
  bool uses_buffers_;
  at::Tensor inputs_;
  at::Tensor outputs_;
};

}  // namespace

std::unique_ptr<Communicator> make_buffered_communicator(Communicator& inner, bool uses_buffers) {
  return std::make_unique<BufferedCommunicator>(inner, uses_buffers);
}

}  // namespace shardtune::conformance
