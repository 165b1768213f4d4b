#include <cstddef>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/structure/rules.hpp"
#include "tests/structure/source_tree.hpp"

namespace shardtune::structure {
namespace {

// Soft limits may be passed where splitting would make the code worse; each exception says why.
const std::map<std::string, std::string> kLongerForAReason = {};

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += "\n  " + line;
  return text;
}

void expect_none(const std::vector<SourceFile>& files,
                 const std::function<std::vector<std::string>(const SourceFile&)>& violations) {
  std::vector<std::string> found;
  for (const SourceFile& file : files) {
    for (const std::string& line : violations(file)) found.push_back(line);
  }
  EXPECT_TRUE(found.empty()) << joined(found);
}

std::string body_of(std::size_t lines) {
  std::string text = "int f(int a) {\n";
  for (std::size_t i = 0; i + 2 < lines; ++i) text += "  ++a;\n";
  return text + "}\n";
}

TEST(Structure, IncludesGoDownOnly) { expect_none(cpp_files(false), layering_violations); }

TEST(Structure, ThirdPartyHeadersStayWhereTheyBelong) { expect_none(cpp_files(true), third_party_violations); }

TEST(Structure, FilesAndFunctionsKeepTheirSizeLimits) {
  std::vector<std::string> found;
  std::set<std::string> paths;
  for (const SourceFile& file : cpp_files(true)) {
    paths.insert(file.path);
    for (const std::string& line : size_violations(file, SizeLimits{}, kLongerForAReason)) found.push_back(line);
  }
  for (const auto& [name, reason] : kLongerForAReason) {
    EXPECT_TRUE(paths.contains(name.substr(0, name.find(": ")))) << "exception for a file that is gone: " << name;
    EXPECT_FALSE(reason.empty()) << name;
  }
  EXPECT_TRUE(found.empty()) << joined(found);
}

TEST(Structure, EveryHeaderIsIncludedOnce) {
  for (const SourceFile& file : cpp_files(true)) {
    if (!is_header(file.path)) continue;
    ASSERT_FALSE(file.lines.empty()) << file.path;
    EXPECT_EQ(file.lines.front(), "#pragma once") << file.path;
  }
}

TEST(Structure, NothingIsLeftOver) { expect_none(text_files(), leftover_violations); }

TEST(Structure, OutputDirectoriesAreMadeDurably) { expect_none(cpp_files(false), durability_violations); }

TEST(StructureRules, CatchADirectoryThatIsNotMadeDurably) {
  const std::string line = "fs::create_directories(output_dir);";
  EXPECT_EQ(durability_violations(make_file("trainer/a.cpp", line)).size(), 1U);
  EXPECT_EQ(durability_violations(make_file("checkpoint/a.cpp", "int a;\n" + line)).size(), 1U);
  EXPECT_EQ(durability_violations(make_file("tests/trainer/a.cpp", line)).size(), 0U);
}

TEST(StructureRules, CatchAnUpwardAndASidewardInclude) {
  const auto violations = [](const std::string& path, const std::string& line) {
    return layering_violations(make_file(path, line)).size();
  };
  EXPECT_EQ(violations("core/a.cpp", "#include \"trainer/options.hpp\""), 1U);
  EXPECT_EQ(violations("models/a.hpp", "#include \"distributed/comm/communicator.hpp\""), 1U);
  EXPECT_EQ(violations("data/a.hpp", "#include \"checkpoint/safetensors.hpp\""), 1U);
  EXPECT_EQ(violations("checkpoint/a.cpp", "#include \"models/model.hpp\""), 1U);
  EXPECT_EQ(violations("core/a.cpp", "#include <core/error.hpp>"), 1U);
  EXPECT_EQ(violations("core/a.cpp", "#include \"error.hpp\""), 1U);
  EXPECT_EQ(violations("trainer/a.cpp", "  #  include \"data/loader.hpp\"\n#include <vector>"), 0U);
}

TEST(StructureRules, CatchAForbiddenThirdPartyHeader) {
  const auto violations = [](const std::string& path, const std::string& header) {
    return third_party_violations(make_file(path, "#include <" + header + ">")).size();
  };
  EXPECT_EQ(violations("distributed/comm/mpi.hpp", "mpi.h"), 1U);
  EXPECT_EQ(violations("distributed/comm/mpi.cpp", "mpi.h"), 0U);
  EXPECT_EQ(violations("trainer/trainer.cpp", "hdf5.h"), 1U);
  EXPECT_EQ(violations("models/bert.cpp", "torch/torch.h"), 1U);
  EXPECT_EQ(violations("core/log.hpp", "spdlog/spdlog.h"), 1U);
  EXPECT_EQ(violations("launcher/options.hpp", "boost/program_options.hpp"), 1U);
  EXPECT_EQ(violations("kernels/linear.hpp", "ATen/ATen.h"), 1U);
  EXPECT_EQ(violations("kernels/linear.hpp", "ATen/core/Tensor.h"), 0U);
}

TEST(StructureRules, CatchTooLongFilesAndFunctions) {
  const SizeLimits limits;
  EXPECT_TRUE(size_violations(make_file("core/a.cpp", body_of(60)), limits, {}).empty());
  EXPECT_EQ(size_violations(make_file("core/a.cpp", body_of(61)), limits, {}).size(), 1U);
  EXPECT_TRUE(size_violations(make_file("core/a.cpp", body_of(61)), limits, {{"core/a.cpp: f", "planted"}}).empty());
  EXPECT_EQ(size_violations(make_file("core/a.hpp", std::string(151, '\n')), limits, {}).size(), 1U);
  EXPECT_EQ(size_violations(make_file("core/a.cpp", std::string(401, '\n')), limits, {}).size(), 1U);
}

TEST(StructureRules, MeasureFunctionsThroughLiteralsLambdasAndInitialisers) {
  const auto functions = functions_of(make_file("core/a.cpp", R"code(
namespace a {
const char* kBrace = "{ ) {";  // { in a comment (
constexpr int kTable[] = {1'000, 2};
struct S : public B<void(int)> {
  S(int a) : a_(a), b_{a} {
    go([&](int x) { return x; });
  }
  std::string raw() const { return R"({(})"; }
  int a_, b_;
};
#define OPEN(x) {
/* { */ enum class E { one, two };
template <typename T>
T twice(T x) {
  if (x == '{') {
    return x;
  }
  return x + x;
}
}  // namespace a
)code"));
  ASSERT_EQ(functions.size(), 3U);
  EXPECT_EQ(functions[0].lines, 3U);  // the constructor's body, not its b_{a}
  EXPECT_EQ(functions[1].lines, 1U);
  EXPECT_EQ(functions[2].lines, 6U);
  EXPECT_EQ(functions[2].line, 15U);
}

TEST(StructureRules, CatchLeftovers) {
  const std::string marker = std::string("TO") + "DO";
  EXPECT_EQ(leftover_violations(make_file("core/a.cpp", "// " + marker + ": later")).size(), 1U);
  EXPECT_EQ(leftover_violations(make_file("core/a.cpp", "// " + marker + "(#12): later")).size(), 0U);
}

}  // namespace
}  // namespace shardtune::structure
