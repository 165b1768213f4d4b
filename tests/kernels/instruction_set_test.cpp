// SHARDTUNE_ISA, and the promise that every choice gives the same bits.
#include "kernels/instruction_set.hpp"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/hash.hpp"
#include "kernels/activation.hpp"
#include "kernels/adamw.hpp"
#include "kernels/attention.hpp"
#include "kernels/cross_entropy.hpp"
#include "kernels/dropout.hpp"
#include "kernels/embedding.hpp"
#include "kernels/fp32_gemm.hpp"
#include "kernels/gated_mlp.hpp"
#include "kernels/norm.hpp"
#include "kernels/rope.hpp"
#include "kernels/sgd.hpp"
#include "kernels/sum_of_squares.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

constexpr const char* kMark = "digest of all kernels: ";

// Hash over the results and gradients of every kernel that has vector code of its own, tails included.
class Digest {
 public:
  void add(const at::Tensor& tensor) {
    const at::Tensor dense = tensor.detach().contiguous();
    text_ += to_hex(hash_bytes(dense.const_data_ptr(), dense.nbytes()));
  }
  void add(const at::Tensor& output, const std::vector<at::Tensor>& inputs) {
    add(output);
    for (const at::Tensor& grad : gradients(output, random_tensor(9, output.sizes().vec()), inputs)) add(grad);
  }
  std::string text() const { return to_hex(hash_bytes(text_)); }

 private:
  std::string text_;
};

void add_kernels(Digest& digest, std::int64_t width, at::ScalarType dtype) {
  constexpr std::int64_t kTokens = 70;
  const auto input = [&](std::uint64_t key, const std::vector<std::int64_t>& shape) {
    return leaf(random_tensor(key, shape, dtype));
  };
  const at::Tensor x = input(1, {kTokens, width}), y = input(2, {kTokens, width});
  const at::Tensor w = input(3, {width}), b = input(4, {width});
  digest.add(layer_norm(x, w, b, 1e-12), {x, w, b});
  digest.add(rms_norm(y, w, 1e-6), {y});
  const ResidualAdd add{input(5, {kTokens, width}), input(6, {kTokens, width}), {.probability = 0.2, .key = 5}};
  for (const NormedSum& sum : {add_layer_norm(add, w, b, 1e-12), add_rms_norm(add, w, 1e-6)})
    digest.add(sum.normed + sum.sum, {add.residual, add.branch});
  const at::Tensor gate = input(1, {kTokens, width}), up = input(2, {kTokens, width}),
                   dropped = input(3, {kTokens, width});
  digest.add(silu_and_mul(at::cat({gate * 8, up}, 1)), {gate, up});
  digest.add(activate(gate * 4, Activation::gelu_tanh), {gate});
  digest.add(dropout(dropped, {.probability = 0.3, .key = 4}), {dropped});
  digest.add(add_dropout(add.residual, dropped, {.probability = 0.3, .key = 5}), {dropped});
  const at::Tensor ids = at::arange(kTokens, at::kLong).remainder(7), table = input(5, {7, width});
  digest.add(embedding_lookup(ids, table, 2), {table});
  const at::Tensor rotated = input(6, {kTokens, 2, 2 * width});
  const at::Tensor frequencies = at::pow(100.0, -at::arange(width, at::kFloat) / 40.0);
  digest.add(rope(rotated, make_rope_tables(at::arange(kTokens, at::kLong), frequencies)), {rotated});
  const at::Tensor q = input(1, {kTokens, 4, width}), k = input(2, {kTokens, 2, width}),
                   v = input(3, {kTokens, 2, width});
  const AttentionOptions attention{.segment_offsets = std::make_shared<const std::vector<std::int64_t>>(
                                       std::vector<std::int64_t>{0, 1, 33, kTokens}),
                                   .is_causal = true,
                                   .scale = 0.2,
                                   .dropout = {.probability = 0.1, .key = 6}};
  // What multiplies bf16 matrices uses products of bf16 where there are any, so its arithmetic differs; so does that of
  // fp32 products where they are not ATen's.
  if (dtype != at::kBFloat16) digest.add(varlen_attention(q, k, v, attention), {q, k, v});
  const at::Tensor hidden = input(7, {kTokens, 8}), head = input(8, {width + 3, 8});
  if (dtype != at::kBFloat16 && !(dtype == at::kFloat && prefers_fp32_products()))
    for (const double smoothing : {0.0, 0.1})
      digest.add(linear_cross_entropy_sum(hidden, head, ids,
                                          {.loss_scale = 0.3, .label_smoothing = smoothing, .chunk_rows = 32}),
                 {hidden, head});
}

void add_optimizers(Digest& digest, std::int64_t numel) {
  const auto numbers = [&](std::uint64_t key) { return random_tensor(key, {numel}); };
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const double beta1 : {0.9, 0.4}) {
      AdamWSlice slice{numbers(1), numbers(2).to(dtype), numbers(3).abs().to(dtype), numbers(4)};
      slice.rounded = at::empty({numel}, beta1 > 0.5 ? at::kBFloat16 : at::kHalf);
      adamw_step(slice, {.beta1 = beta1, .weight_decay = 0.01, .step = 3});
      for (const at::Tensor& tensor : {slice.param, slice.exp_avg, slice.exp_avg_sq, slice.rounded}) digest.add(tensor);
    }
  }
  for (const double decay : {0.0, 0.01}) {
    const SgdSlice plain{numbers(1), {}, numbers(4)};
    sgd_step(plain, {.weight_decay = decay, .grad_scale = 0.3});
    digest.add(plain.param);
    for (const bool nesterov : {false, true}) {
      const SgdSlice slice{numbers(1), numbers(2), numbers(4)};
      sgd_step(slice, {.momentum = 0.9, .weight_decay = decay, .nesterov = nesterov, .grad_scale = 0.3});
      for (const at::Tensor& tensor : {slice.param, slice.momentum_buffer}) digest.add(tensor);
    }
  }
}

std::string digest_of_all_kernels() {
  Digest digest;
  for (std::int64_t numel = 0; numel < 40; ++numel)
    digest.add(at::full({1}, sum_of_squares(random_tensor(9, {40}).const_data_ptr<float>(), numel), at::kDouble));
  for (const std::int64_t width : {5, 16, 33, 200, 1003})
    for (const at::ScalarType dtype : kDtypes) add_kernels(digest, width, dtype);
  for (const std::int64_t numel : {1, 37, 1003}) add_optimizers(digest, numel);
  return digest.text();
}

// Output of this very program under another SHARDTUNE_ISA, running the test below only.
std::string run_under(const std::string& isa) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe");
  const std::string command =
      fmt::format("SHARDTUNE_ISA='{}' '{}' --gtest_filter=InstructionSet.DigestOfThisProcess 2>&1", isa, self);
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  EXPECT_NE(pipe, nullptr);
  std::string output;
  for (int c = 0; pipe != nullptr && (c = std::fgetc(pipe.get())) != EOF;) output += static_cast<char>(c);
  return output;
}

TEST(HalfPrecision, IsWhatTheKernelOfTheSystemLists) {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::set<std::string> flags;
  for (std::string line; std::getline(cpuinfo, line) && flags.empty();) {
    if (!line.starts_with("flags")) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;) flags.insert(word);
  }
  ASSERT_TRUE(flags.contains("fpu")) << "no flags found";
  EXPECT_EQ(half_precision().has_bf16, flags.contains("avx512_bf16"));
  EXPECT_EQ(half_precision().has_fp16, flags.contains("avx512_fp16"));
}

TEST(InstructionSet, DigestOfThisProcess) { std::printf("%s%s\n", kMark, digest_of_all_kernels().c_str()); }

TEST(InstructionSet, EveryChoiceGivesTheSameBits) {
  const std::string wanted = kMark + digest_of_all_kernels();
  for (const char* name : {"portable", "avx2", "avx512", "avx512_bf16", "amx"}) {
    const std::string output = run_under(name);
    bool is_available = true;
    try {
      choose_instruction_set(name);
    } catch (const Error&) {
      is_available = false;
    }
    EXPECT_NE(output.find(is_available ? wanted : "which this processor lacks"), std::string::npos) << name << output;
  }
}

TEST(InstructionSet, UnknownNamesAreRefused) {
  EXPECT_EQ(choose_instruction_set(nullptr), best_instruction_set());
  for (const InstructionSet set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512,
                                   InstructionSet::avx512_bf16, InstructionSet::amx}) {
    if (set <= best_instruction_set()) {
      EXPECT_EQ(choose_instruction_set(name_of(set)), set) << name_of(set);
    }
  }
  for (const char* name : {"", "AVX2", "avx1024"}) {
    try {
      choose_instruction_set(name);
      FAIL() << "accepted " << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::config);
      EXPECT_NE(std::string(error.what()).find(fmt::format("SHARDTUNE_ISA is '{}'", name)), std::string::npos);
    }
  }
  EXPECT_NE(run_under("avx1024").find("SHARDTUNE_ISA is 'avx1024'"), std::string::npos) << "the kernels read it";
}

}  // namespace
}  // namespace shardtune::testing
