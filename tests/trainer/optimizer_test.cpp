// The rows of the optimizer table beside AdamW: what options ask for, and that SGD is sharded, saved and resumed.
#include "trainer/optimizer.hpp"

#include <filesystem>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/inspect.hpp"
#include "checkpoint/tools.hpp"
#include "core/error.hpp"
#include "tests/support/error_of.hpp"
#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"

namespace shardtune {
namespace {

namespace fs = std::filesystem;
using testing_support::error_of;
using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::resume_on_threads;
using testing_support::TinyFamily;
using testing_support::train_on_threads;

TrainOptions sgd(const std::string& arguments) {
  TrainOptions train;
  train.optim = "sgd";
  train.optim_args = arguments;
  return train;
}

TEST(OptimizerOptions, SgdReadsHuggingFacesArguments) {
  const OptimizerSettings plain = optimizer_settings(sgd(""));
  EXPECT_EQ(plain.momentum, 0.0);
  EXPECT_FALSE(plain.nesterov);
  EXPECT_EQ(optimizer_family(plain), "sgd");
  const OptimizerSettings nesterov = optimizer_settings(sgd("momentum=0.75, nesterov=True,dampening=0"));
  EXPECT_EQ(nesterov.momentum, 0.75);
  EXPECT_TRUE(nesterov.nesterov);
  EXPECT_EQ(optimizer_family(nesterov), "sgd with momentum");
  EXPECT_EQ(optimizer_family(optimizer_settings({})), "adamw");
}

TEST(OptimizerOptions, WhatAnOptimizerDoesNotTakeIsRefusedByName) {
  const auto expect_refused = [](const TrainOptions& train, const std::string& words) {
    const std::string said = error_of(ErrorKind::config, [&] { optimizer_settings(train); });
    EXPECT_NE(said.find(words), std::string::npos) << said;
  };
  expect_refused(sgd("momentum=1"), "momentum = 1");
  expect_refused(sgd("momentum=fast"), "momentum = fast");
  expect_refused(sgd("momentum=0.9,dampening=0.1"), "dampening = 0.1");
  expect_refused(sgd("nesterov=true"), "needs momentum");
  expect_refused(sgd("momentum=0.9,nesterov=maybe"), "nesterov = maybe");
  expect_refused(sgd("weight_decay=0.1"), "--weight_decay");
  expect_refused(sgd("lr=0.1"), "lr = 0.1");
  expect_refused(sgd("momentum"), "NAME=VALUE");
  expect_refused(sgd("momentum=0.9,momentum=0.8"), "given twice");
  TrainOptions adamw;
  adamw.optim_args = "beta1=0.8";
  expect_refused(adamw, "--adam_beta1");
  TrainOptions unknown;
  unknown.optim = "adafactor";
  expect_refused(unknown, "adamw_torch, adamw_torch_fused, sgd");
  TrainOptions small_state = sgd("momentum=0.9");
  small_state.adam_state_dtype = "bf16";
  expect_refused(small_state, "adam_state_dtype");
}

TEST(OptimizerOptions, AdamWsSettingsBesideSgdAreRefused) {
  const auto directory = fresh_directory("sgd_options");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.optim = "sgd";
  EXPECT_NO_THROW(validate(options, "train"));
  options.explicitly_set = {"adam_beta2"};
  EXPECT_THROW(validate(options, "train"), Error);
  options.train.optim = "adamw_torch";
  EXPECT_NO_THROW(validate(options, "train"));
  fs::remove_all(directory);
}

RunOptions sgd_run(const fs::path& directory, TinyFamily family) {
  RunOptions options = make_tiny_run(directory, family);
  options.train.optim = "sgd";
  options.train.optim_args = "momentum=0.9,nesterov=true";
  options.train.learning_rate = 0.05;
  options.train.weight_decay = 0.01;
  options.train.max_steps = 6;
  options.train.save_strategy = Interval::steps;
  options.train.save_steps = 3;
  options.train.global_batch_size = 12;
  options.train.logging_strategy = Interval::no;
  options.train.output_dir = directory / "reference";
  return options;
}

TEST(SgdRun, HasOneHashUnderEveryPlanAndThroughResumes) {
  for (const TinyFamily family : {TinyFamily::bert, TinyFamily::llama}) {
    const auto directory = fresh_directory(fmt::format("sgd_{}", static_cast<int>(family)));
    RunOptions options = sgd_run(directory, family);
    const std::string wanted = train_on_threads(options, 1);
    EXPECT_EQ(resume_on_threads(options, 3, 3), wanted);
    for (const char* plan : {"ddp", "zero1", "zero2", "zero3", "hsdp"}) {
      options.train.sharding = plan;
      options.train.hsdp_shard_size = plan == std::string("hsdp") ? 2 : 0;
      options.train.output_dir = directory / plan;
      EXPECT_EQ(train_on_threads(options, 4), wanted) << plan;
    }
    options.train.hsdp_shard_size = 1;
    EXPECT_EQ(resume_on_threads(options, 2, 3), wanted) << "hsdp, resumed on 2 ranks";
    // Worth something only if momentum is at work.
    options.train.optim_args.clear();
    options.train.output_dir = directory / "plain";
    EXPECT_NE(train_on_threads(options, 2), wanted);
    fs::remove_all(directory);
  }
}

TEST(SgdRun, ItsCheckpointHoldsMomentumUnderTorchsNameAndExports) {
  const auto directory = fresh_directory("sgd_checkpoint");
  RunOptions options = sgd_run(directory, TinyFamily::bert);
  options.train.sharding = "zero3";
  const std::string weights = train_on_threads(options, 3);
  const fs::path checkpoint = fs::path(options.train.output_dir) / "checkpoint-6";
  int num_tensors = 0;
  const nlohmann::json description = describe_checkpoint(checkpoint);
  for (const auto& tensor : description.at("tensors")) {
    EXPECT_EQ(tensor.at("fields").size(), 2U) << tensor;
    EXPECT_TRUE(tensor.at("fields").contains("momentum_buffer")) << tensor;
    ++num_tensors;
  }
  EXPECT_GT(num_tensors, 20);
  const auto statistics = describe_tensor(checkpoint, "classifier.weight").at("fields").at("momentum_buffer");
  EXPECT_GT(statistics.at("max").get<double>(), 0.0) << statistics;
  export_safetensors(checkpoint, directory / "exported", {});
  EXPECT_EQ(testing_support::sha256_of(directory / "exported/model.safetensors"), weights);
  fs::remove_all(directory);
}

TEST(SgdRun, AnotherOptimizersCheckpointIsRefused) {
  const auto directory = fresh_directory("sgd_refused");
  RunOptions options = sgd_run(directory, TinyFamily::bert);
  train_on_threads(options, 2);
  const auto expect_refused = [&](const std::string& optim, const std::string& arguments, const std::string& words) {
    RunOptions other = options;
    other.train.optim = optim;
    other.train.optim_args = arguments;
    try {
      resume_on_threads(other, 2, 3);
      ADD_FAILURE() << optim << " " << arguments << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::config);
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    }
  };
  expect_refused("adamw_torch", "", "trained by sgd with momentum and its state is of no use to adamw");
  expect_refused("sgd", "", "trained by sgd with momentum and its state is of no use to sgd;");
  options.train.optim = "adamw_torch";
  options.train.optim_args.clear();
  options.train.output_dir = directory / "adamw";
  train_on_threads(options, 1);
  expect_refused("sgd", "momentum=0.9", "trained by adamw");
  fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
