#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "kernels/instruction_set.hpp"
#include "tests/support/error_of.hpp"
#include "tests/support/tiny_run.hpp"
#include "trainer/build.hpp"
#include "trainer/loss_scaler.hpp"
#include "trainer/metrics.hpp"
#include "trainer/model_source.hpp"
#include "trainer/observer.hpp"
#include "trainer/precision_check.hpp"
#include "trainer/run_state.hpp"
#include "trainer/schedule.hpp"

namespace shardtune {
namespace {

// Values of transformers' get_scheduler("linear", num_warmup_steps=2, num_training_steps=7) with lr 1.
TEST(Schedule, LinearWithWarmupGivesHuggingFacesRates) {
  const LearningRateSchedule schedule("linear", 1.0, 2, 7);
  const double expected[] = {0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0};
  for (int step = 0; step < 8; ++step) EXPECT_DOUBLE_EQ(schedule.at(step), expected[step]) << step;
}

TEST(Schedule, ConstantKindsStayConstantAfterWarmup) {
  EXPECT_EQ(LearningRateSchedule("constant", 0.5, 3, 5).at(0), 0.5);
  const LearningRateSchedule warm("constant_with_warmup", 0.5, 4, 5);
  EXPECT_EQ(warm.at(1), 0.125);
  EXPECT_EQ(warm.at(4), 0.5);
  EXPECT_EQ(warm.at(100), 0.5);
  EXPECT_THROW(LearningRateSchedule("cosine", 1, 0, 1), Error);
}

TEST(Schedule, SharesOfAllStepsRoundUpAsInHuggingFace) {
  EXPECT_EQ(resolve_warmup(0, 0.1, 101), 11);
  EXPECT_EQ(resolve_warmup(0.1, 0, 101), 11);
  EXPECT_EQ(resolve_warmup(5, 0, 101), 5);
  EXPECT_EQ(resolve_interval(0.25, 10), 3);
  EXPECT_EQ(resolve_interval(500, 10), 500);
}

// torch.amp.GradScaler with its defaults.
TEST(LossScaler, HalvesOnOverflowAndDoublesAfterTwoThousandGoodSteps) {
  LossScaler scaler(LossScaler::kInitialScale, 0);
  EXPECT_EQ(scaler.scale(), 65536.0);
  for (int i = 0; i < 1999; ++i) scaler.update(false);
  EXPECT_EQ(scaler.scale(), 65536.0);
  scaler.update(true);
  EXPECT_EQ(scaler.scale(), 32768.0);
  for (int i = 0; i < 1999; ++i) scaler.update(false);
  EXPECT_EQ(scaler.scale(), 32768.0);
  EXPECT_EQ(scaler.growth_tracker(), 1999);
  scaler.update(false);
  EXPECT_EQ(scaler.scale(), 65536.0);
  EXPECT_EQ(scaler.growth_tracker(), 0);
  for (int i = 0; i < 16; ++i) scaler.update(true);
  EXPECT_EQ(scaler.scale(), 1.0);
  EXPECT_THROW(scaler.update(true), Error);
}

TEST(LossScaler, IsOffByDefaultAndSurvivesACheckpoint) {
  LossScaler off;
  off.update(true);
  EXPECT_EQ(off.scale(), 1.0);
  RunState state;
  EXPECT_FALSE(RunState::from_json(state.to_json(), "test").scaler.is_on());
  state.scaler = LossScaler(4096.0, 17);
  state.skipped_steps = 3;
  const RunState read = RunState::from_json(state.to_json(), "test");
  EXPECT_TRUE(read.scaler.is_on());
  EXPECT_EQ(read.scaler.scale(), 4096.0);
  EXPECT_EQ(read.scaler.growth_tracker(), 17);
  EXPECT_EQ(read.skipped_steps, 3);
}

// sklearn.metrics.f1_score([0,0,1,1,2,2,2],[0,1,1,1,2,0,2], average="macro")
TEST(Metrics, MacroF1IsScikitLearns) {
  const std::vector<std::int64_t> expected{0, 0, 1, 1, 2, 2, 2}, predicted{0, 1, 1, 1, 2, 0, 2};
  EXPECT_NEAR(macro_f1(predicted, expected), (0.5 + 0.8 + 0.8) / 3, 1e-12);
  EXPECT_NEAR(accuracy(predicted, expected), 5.0 / 7, 1e-12);
  EXPECT_EQ(macro_f1({3}, {1}), 0.0);
}

TEST(MetricsWriter, DropsRecordsAfterTheResumedStepAndCutLines) {
  const auto directory = std::filesystem::path(testing::TempDir()) / "metrics_writer";
  std::filesystem::create_directories(directory);
  std::ofstream(directory / "metrics.jsonl") << "{\"step\": 1}\n{\"step\": 2}\n{\"step\": 3}\n{\"ste";
  make_metrics_writer(directory, 2)->on_record({{"step", 3}, {"loss", 0.1}, {"grad_norm", std::nan("")}});
  std::ifstream in(directory / "metrics.jsonl");
  std::string text((std::istreambuf_iterator<char>(in)), {});
  EXPECT_EQ(text, "{\"step\": 1}\n{\"step\": 2}\n{\"grad_norm\": null, \"loss\": 0.1, \"step\": 3}\n");
}

TEST(PrecisionCheck, RefusesEmulatedFp16AndWarnsOfEmulatedBf16) {
  const auto note = [](bool bf16, bool fp16, const HalfPrecision& processor, bool is_emulation_wanted = false) {
    TrainOptions train;
    train.bf16 = bf16;
    train.fp16 = fp16;
    return check_precision(train, processor, is_emulation_wanted);
  };
  EXPECT_NE(note(true, false, {}).find("--bf16 true: this processor has no bf16"), std::string::npos);
  EXPECT_EQ(note(true, false, {.has_bf16 = true}), "");
  EXPECT_EQ(note(false, true, {.has_fp16 = true}), "");
  EXPECT_EQ(note(false, false, {}), "");
  const std::string refusal = testing_support::error_of(ErrorKind::config, [&] { note(false, true, {.has_bf16 = true}); });
  EXPECT_NE(refusal.find("--fp16 true: this processor has no fp16"), std::string::npos) << refusal;
  EXPECT_NE(refusal.find("use --bf16 true"), std::string::npos) << refusal;
  EXPECT_NE(note(false, true, {}, true).find("--fp16 true: this processor has no fp16"), std::string::npos);
}

TEST(Environment, ADifferentOrderOfSumsIsADifference) {
  const auto described = [](ReductionOrder reduction, int num_ranks) {
    const ParallelOptions parallel{.plan = find_sharding_plan("zero3"), .reduction = reduction};
    return describe_environment({}, describe_reduction(parallel, num_ranks));
  };
  const auto tree = described(ReductionOrder::tree, 4);
  EXPECT_TRUE(environment_differences(tree, described(ReductionOrder::tree, 3)).empty());
  nlohmann::json old = tree;
  old.erase("reduction");
  EXPECT_TRUE(environment_differences(old, tree).empty()) << "there was nothing but the tree";
  EXPECT_TRUE(environment_differences(described(ReductionOrder::fast, 4), described(ReductionOrder::fast, 4)).empty());
  const auto differences = environment_differences(described(ReductionOrder::fast, 4), described(ReductionOrder::fast, 3));
  ASSERT_EQ(differences.size(), 1U);
  EXPECT_EQ(differences.front(), "reduction: \"fast, zero3 on 4 ranks\" before, \"fast, zero3 on 3 ranks\" now");
  EXPECT_EQ(environment_differences(tree, described(ReductionOrder::fast, 4)).size(), 1U);
  EXPECT_EQ(environment_differences(described(ReductionOrder::fast, 4), tree).size(), 1U);
}

TEST(Environment, OtherInstructionsOfTheKernelsAreADifferenceInBf16) {
  for (const bool is_bf16 : {false, true}) {
    RunOptions options;
    options.train.bf16 = is_bf16;
    const auto now = describe_environment(options, "tree");
    EXPECT_EQ(now.at("kernels"), name_of(instruction_set()));
    auto before = now;
    before["kernels"] = "abacus";
    const auto differences = environment_differences(before, now);
    ASSERT_EQ(differences.size(), is_bf16 ? 1U : 0U);
    if (!is_bf16) continue;
    EXPECT_EQ(differences.front(), fmt::format("kernels: \"abacus\" before, \"{}\" now", name_of(instruction_set())));
  }
}

TEST(Environment, OtherFp32ProductsAreADifferenceAndOldCheckpointsHadTheLibrarys) {
  const auto now = describe_environment(RunOptions(), "tree");
  auto own = now, library = now, old = now;
  own["fp32_products"] = "own";
  library["fp32_products"] = "library";
  old.erase("fp32_products");
  EXPECT_EQ(environment_differences(library, own).size(), 1U);
  EXPECT_EQ(environment_differences(old, own).size(), 1U);
  EXPECT_TRUE(environment_differences(old, library).empty());
}

TEST(Environment, KernelsWithOtherBitsAreADifference) {
  const auto now = describe_environment(RunOptions(), "tree");
  auto old = now;
  old.erase("kernel_revision");
  const auto differences = environment_differences(old, now);
  ASSERT_EQ(differences.size(), 1U);
  EXPECT_EQ(differences.front(), fmt::format("kernel_revision: 1 before, {} now", kKernelRevision));
}

TEST(LoadedModel, ClassesWithoutNamesInTheConfigAreHuggingFacesDefaults) {
  RunOptions options = testing_support::make_tiny_run(testing_support::fresh_directory("unnamed_classes"), testing_support::TinyFamily::bert);
  const auto file = std::filesystem::path(options.model.config_name) / "config.json";
  nlohmann::json config = nlohmann::json::parse(std::ifstream(file));
  config.erase("id2label");
  config["num_labels"] = 3;
  std::ofstream(file) << config;
  const auto world = make_self_communicator();
  EXPECT_EQ(load_for_inference(options, *world).labels, (std::vector<std::string>{"LABEL_0", "LABEL_1", "LABEL_2"}));
}

// One wrong byte must not become another model without a word.
TEST(ModelSource, ADamagedConfigurationOrTokenizerOfACheckpointIsRefused) {
  namespace fs = std::filesystem;
  const fs::path directory = testing_support::fresh_directory("model_source");
  const fs::path golden = fs::path(std::getenv("SHARDTUNE_SOURCE_DIR")) / "tests/golden/checkpoint_v1";
  for (const char* name : {"config.json", "tokenizer.json"}) {
    const fs::path checkpoint = directory / name;
    fs::copy(golden, checkpoint);
    ModelOptions from_checkpoint, from_config, with_tokenizer;
    from_checkpoint.model_name_or_path = checkpoint.string();
    from_config.config_name = checkpoint.string();
    with_tokenizer.config_name = golden.string();
    with_tokenizer.tokenizer_name = checkpoint.string();
    for (const ModelOptions& options : {from_checkpoint, from_config, with_tokenizer})
      EXPECT_NO_THROW(find_model_source(options));
    std::fstream(checkpoint / name, std::ios::in | std::ios::out).seekp(15) << 'x';
    for (const ModelOptions& options : {from_checkpoint, from_config, with_tokenizer}) {
      const std::string said = testing_support::error_of(ErrorKind::data, [&] { find_model_source(options); });
      EXPECT_NE(said.find((checkpoint / name).string()), std::string::npos) << said;
    }
  }
  fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
