// fp16 with its loss scale, bf16 moments and bf16 reduction through whole runs: the same bits at any rank count, through
// a checkpoint, and when gradients overflow.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <set>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "tests/support/error_of.hpp"
#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"
#include "trainer/build.hpp"
#include "trainer/weights.hpp"

namespace shardtune {
namespace {

namespace fs = std::filesystem;
using testing_support::error_of;
using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::MakeHooks;
using testing_support::resume_on_threads;
using testing_support::sha256_of;
using testing_support::TinyFamily;
using testing_support::train_on_threads;

constexpr std::int64_t kSteps = 6;

// These tests are about bits and loss scales, on any processor.
void emulate_fp16() { ::setenv("SHARDTUNE_EMULATE_FP16", "1", 1); }

RunOptions tiny_options(const fs::path& directory, TinyFamily family) {
  RunOptions options = make_tiny_run(directory, family);
  options.train.max_steps = kSteps;
  options.train.save_strategy = Interval::steps;
  options.train.save_steps = 3;
  options.train.global_batch_size = 12;
  options.train.logging_strategy = Interval::no;
  return options;
}

void expect_one_hash(const std::string& name, const std::function<void(TrainOptions&)>& adjust) {
  for (const TinyFamily family : {TinyFamily::bert, TinyFamily::llama}) {
    const auto directory = fresh_directory(fmt::format("precision_{}_{}", name, static_cast<int>(family)));
    RunOptions options = tiny_options(directory, family);
    adjust(options.train);
    options.train.output_dir = directory / "reference";
    const std::string wanted = train_on_threads(options, 1);
    EXPECT_EQ(resume_on_threads(options, 3, 3), wanted) << name;
    for (const char* plan : {"ddp", "zero1", "zero2", "zero3", "hsdp"}) {
      options.train.sharding = plan;
      options.train.hsdp_shard_size = plan == std::string("hsdp") ? 2 : 0;
      options.train.output_dir = directory / plan;
      EXPECT_EQ(train_on_threads(options, 4), wanted) << name << " " << plan;
    }
    fs::remove_all(directory);
  }
}

TEST(Precision, Fp16HasOneHash) {
  emulate_fp16();
  expect_one_hash("fp16", [](TrainOptions& train) { train.fp16 = true; });
}

TEST(Precision, Bf16MomentsAndReductionHaveOneHash) {
  expect_one_hash("bf16", [](TrainOptions& train) {
    train.bf16 = true;
    train.adam_state_dtype = "bf16";
    train.reduce_dtype = "bf16";
    train.gradient_checkpointing = true;
    train.gradient_checkpointing_mode = "selective";
  });
}

// Makes one exchange of gradients on rank 1 bring an infinity.
MakeHooks overflow_once() {
  return [](int rank) {
    toy::CommunicatorHooks hooks;
    auto num_seen = std::make_shared<int>(0);
    hooks.after = [rank, num_seen](const std::string& operation, const at::Tensor& out) {
      if (rank != 1 || operation != "all_to_all" || out.numel() == 0 || ++*num_seen != 7) return;
      out[out.numel() - 1] = std::numeric_limits<float>::infinity();
    };
    return hooks;
  };
}

// Of a run that saved every step.
std::set<std::int64_t> skipped_steps(const fs::path& output_dir) {
  std::set<std::int64_t> skipped;
  std::int64_t before = 0;
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    const auto state = read_checkpoint_run_state(output_dir / fmt::format("checkpoint-{}", step)).at("state");
    const auto count = state.at("skipped_steps").get<std::int64_t>();
    if (count > before) skipped.insert(step);
    before = count;
  }
  return skipped;
}

struct Reference {
  std::string hash;
  double loss_scale = 65536.0;
  int num_finite_left_out = 0;
};

// One rank trains without Trainer and LossScaler: it computes the gradients of the steps `left_out` and does nothing
// with them. As torch's GradScaler and accelerate have it, such a step halves the scale and moves neither the schedule
// nor Adam's count of steps; the data go on.
Reference train_without(const RunOptions& options, const std::set<std::int64_t>& left_out) {
  Reference reference;
  at::set_num_threads(1);
  const auto world = make_self_communicator();
  ModelSource source = find_model_source(options.model);
  const auto tokenizer = build_tokenizer(source);
  DatasetOptions data = dataset_options(options, options.data.train_file, 0);
  const auto labels = training_labels(source.config, collect_labels(data));
  const auto model = build_model(source, options.model, labels);
  data.max_length = resolve_max_length(options.data, *model, source);
  const auto dataset = build_dataset(data, options.model.task, labels, *tokenizer);
  StepLoader loader(*dataset, loader_options(fresh_identity(options, 1), *model), {});
  ParallelEngine engine(model->units(), *world, parallel_options(options.train, *world));
  initialize_randomly(engine, static_cast<std::uint64_t>(options.train.seed));
  Optimizer optimizer(engine, optimizer_settings(options.train));
  std::int64_t updates = 0;
  for (std::int64_t step = 0; step < kSteps; ++step) {
    const StepBatches batches = loader.next();
    const auto num_batches = static_cast<std::int64_t>(batches.micro_batches.size());
    engine.begin_step(num_batches);
    for (std::int64_t i = 0; i < num_batches; ++i) {
      engine.begin_micro_batch(i);
      const ForwardContext context{.is_training = true, .seed = 42, .step = step, .micro_batch = i};
      const double scale = reference.loss_scale / static_cast<double>(batches.num_labelled);
      const Batch& batch = batches.micro_batches[static_cast<std::size_t>(i)];
      engine.backward(model->forward(batch, engine.runner(), context, {.loss_scale = scale}).loss_sum);
    }
    engine.finish_step();
    const double norm = engine.grad_norm() / reference.loss_scale;
    if (left_out.contains(step + 1)) {
      reference.num_finite_left_out += std::isfinite(norm) ? 1 : 0;
      reference.loss_scale /= 2;
    } else {
      EXPECT_TRUE(std::isfinite(norm)) << "step " << step + 1;
      const double rate = options.train.learning_rate * static_cast<double>(kSteps - updates) / kSteps;  // linear
      optimizer.step(rate, std::min(1.0, 1.0 / (norm + 1e-6)) / reference.loss_scale, ++updates);
    }
    engine.after_optimizer_step();
  }
  const fs::path directory = fs::path(options.train.output_dir) / "model";
  export_model(*world, engine, directory, companion_files(*model, source));
  reference.hash = sha256_of(directory / "model.safetensors");
  return reference;
}

TEST(Precision, AnOverflowOnOneRankIsSkippedByAllAndHalvesTheScale) {
  emulate_fp16();
  for (const char* plan : {"ddp", "zero3"}) {
    const auto directory = fresh_directory(fmt::format("overflow_{}", plan));
    RunOptions options = tiny_options(directory, TinyFamily::bert);
    options.train.fp16 = true;
    options.train.sharding = plan;
    options.train.save_steps = 1;
    options.train.output_dir = directory / "plain";
    const std::string undisturbed = train_on_threads(options, 2);
    const nlohmann::json before = read_checkpoint_run_state(directory / "plain/checkpoint-6").at("state");
    options.train.output_dir = directory / "disturbed";
    EXPECT_NE(train_on_threads(options, 2, overflow_once()), undisturbed);
    const nlohmann::json after = read_checkpoint_run_state(directory / "disturbed/checkpoint-6").at("state");
    EXPECT_EQ(after.at("skipped_steps"), before.at("skipped_steps").get<int>() + 1) << plan;
    EXPECT_EQ(after.at("loss_scale"), before.at("loss_scale").get<double>() / 2) << plan;
    EXPECT_EQ(after.at("step"), 6) << plan;
    // The loss scale and the count of skipped steps are part of the run: resumed on another number of ranks it ends alike.
    const std::string disturbed = sha256_of(directory / "disturbed/model/model.safetensors");
    EXPECT_EQ(resume_on_threads(options, 3, 3), disturbed) << plan;
    // And it is the run in which that one step, whose gradients are none the worse elsewhere, was left out.
    const std::set<std::int64_t> skipped = skipped_steps(directory / "disturbed");
    options.train.sharding = "ddp";
    options.train.output_dir = directory / "reference";
    const Reference reference = train_without(options, skipped);
    EXPECT_EQ(reference.num_finite_left_out, 1) << plan;
    EXPECT_EQ(reference.loss_scale, after.at("loss_scale")) << plan;
    EXPECT_EQ(reference.hash, disturbed) << plan;
    fs::remove_all(directory);
  }
}

TEST(Precision, TheSameInfinityEndsARunThatHasNoLossScale) {
  const auto directory = fresh_directory("overflow_fp32");
  RunOptions options = tiny_options(directory, TinyFamily::bert);
  const auto said = [&] {
    return error_of(ErrorKind::numeric, [&] { train_on_threads(options, 2, overflow_once()); });
  };
  const std::string in_fp32 = said();
  EXPECT_NE(in_fp32.find("lower --learning_rate or check the data"), std::string::npos) << in_fp32;
  EXPECT_EQ(in_fp32.find("--bf16"), std::string::npos) << in_fp32;
  options.train.bf16 = true;
  options.train.overwrite_output_dir = true;
  EXPECT_NE(said().find("train without --bf16"), std::string::npos);
  fs::remove_all(directory);
}

TEST(FastReduction, GivesTheSameBitsAgainAndResumesOnOtherRanks) {
  const auto directory = fresh_directory("fast");
  RunOptions options = tiny_options(directory, TinyFamily::llama);
  options.train.global_batch_size = 20;  // five micro-batches: sums of fewer have the order of the tree by chance
  options.train.output_dir = directory / "tree";
  const std::string tree = train_on_threads(options, 3);
  options.train.reduction = "fast";
  for (const char* plan : {"ddp", "zero1", "zero2", "zero3", "hsdp"}) {
    options.train.sharding = plan;
    options.train.hsdp_shard_size = plan == std::string("hsdp") ? 1 : 0;
    options.train.output_dir = directory / plan;
    const std::string fast = train_on_threads(options, 3);
    EXPECT_NE(fast, tree) << plan << " added in the order of the tree";
    EXPECT_EQ(resume_on_threads(options, 3, 3), fast) << plan;
    EXPECT_NE(resume_on_threads(options, 2, 3), fast) << plan << ": accepted, but bits are not promised";
  }
  fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
