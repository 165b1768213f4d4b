#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/handle.hpp"
#include "core/hash.hpp"
#include "core/json.hpp"
#include "core/rng.hpp"

namespace shardtune {
namespace {

// Known answers of Random123's kat_vectors for philox4x32-10.
TEST(Philox, MatchesPublishedKnownAnswers) {
  EXPECT_EQ(philox4x32(0, 0, 0), (std::array<std::uint32_t, 4>{0x6627e8d5U, 0xe169c58dU, 0xbc57ac4cU, 0x9b00dbd8U}));
  EXPECT_EQ(philox4x32(~0ULL, ~0ULL, ~0ULL),
            (std::array<std::uint32_t, 4>{0x408f276dU, 0x41c83b0eU, 0xa20bc7c6U, 0x6d5451fdU}));
}

TEST(Philox, BoundedNumbersStayBelowTheBoundAndReachAllValues) {
  PhiloxStream stream(7);
  std::array<int, 5> seen{};
  for (int i = 0; i < 1000; ++i) ++seen.at(stream.next_below(5));
  for (const int count : seen) EXPECT_GT(count, 100);
}

struct CountingTraits {
  static inline int destroyed = 0;
  static int null() noexcept { return 0; }
  static void destroy(int) noexcept { ++destroyed; }
};

TEST(UniqueHandle, DestroysEachHandleExactlyOnce) {
  using Handle = UniqueHandle<int, CountingTraits>;
  CountingTraits::destroyed = 0;
  {
    Handle a(1), b(2);
    Handle c(std::move(a));
    b = std::move(c);
    EXPECT_EQ(CountingTraits::destroyed, 1);
    EXPECT_EQ(b.get(), 1);
  }
  EXPECT_EQ(CountingTraits::destroyed, 2);
}

std::string message_of(const std::string& text, const JsonLimits& limits = {}) {
  try {
    parse_json(text, "f.json", limits);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::data);
    return e.what();
  }
  return "";
}

TEST(Hash, AFileHashesAsItsBytesWhereverPiecesEnd) {
  const auto file = std::filesystem::path(testing::TempDir()) / "hash_file";
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{1} << 20, (std::size_t{1} << 20) + 1, std::size_t{3'000'000}}) {
    std::string bytes(size, 'x');
    for (std::size_t i = 0; i < size; i += 7) bytes[i] = static_cast<char>(i);
    std::ofstream(file, std::ios::binary) << bytes;
    EXPECT_EQ(hash_file_bytes(file), hash_bytes(bytes)) << size;
  }
  std::filesystem::remove(file);
  EXPECT_THROW(hash_file_bytes(file), Error);
}

TEST(File, DirectoriesAreMadeLevelByLevel) {
  const std::filesystem::path top = std::filesystem::temp_directory_path() / "shardtune_core_test_directories";
  std::filesystem::remove_all(top);
  for (const auto& directory : {top / "a/b/c", top / "a/b/c", top / "a/d/"}) {
    make_directories_durably(directory);
    EXPECT_TRUE(std::filesystem::is_directory(directory)) << directory;
  }
  std::ofstream(top / "file") << "x";
  for (const auto& directory : {top / "file", top / "file/a"}) {
    try {
      make_directories_durably(directory);
      ADD_FAILURE() << directory;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::io);
      EXPECT_NE(std::string(e.what()).find(directory.string() + ": Not a directory"), std::string::npos) << e.what();
    }
  }
  std::filesystem::remove_all(top);
}

TEST(Json, RefusesWhatBrokenFilesHoldAndNamesTheFile) {
  EXPECT_NE(message_of(R"({"a":1,"a":2})").find("f.json: JSON key 'a' appears twice"), std::string::npos);
  EXPECT_NE(message_of(R"({"a":1} x)").find("f.json"), std::string::npos);
  EXPECT_NE(message_of("{\"a\":\"\xff\"}").find("f.json"), std::string::npos);
  EXPECT_NE(message_of(std::string(70, '[') + std::string(70, ']')).find("deeper than 64"), std::string::npos);
  EXPECT_NE(message_of(std::string(100000, '[')).find("deeper than 64"), std::string::npos);
  EXPECT_NE(message_of(R"({"a": NaN})"), "");
}

TEST(Json, ReadsPythonsBareNanWhereAllowed) {
  const auto value = parse_json(R"({"a": NaN, "b": "NaN", "c": -Infinity})", "f", {.allow_nan = true});
  EXPECT_TRUE(value["a"].is_null());
  EXPECT_EQ(value["b"], "NaN");
}

// What a fuzzer found: the parser reprints what it has read, a line feed as <U+000A>.
TEST(Json, AMessageIsForPeopleWhateverTheInput) {
  const std::string lines(100'000, '\n');
  std::string name;
  for (int i = 0; i < 50'000; ++i) name += "\u20ac";
  for (const std::string& text : {"{" + lines + "wR", "[\"" + name, "{\"" + name + "\": 1, \"" + name + "\": 2}"}) {
    const std::string message = message_of(text);
    EXPECT_TRUE(message.starts_with("f.json: ")) << message.substr(0, 100);
    EXPECT_LT(message.size(), 500U);
    EXPECT_NO_THROW(nlohmann::json(message).dump()) << "broken UTF-8";
  }
  EXPECT_NE(message_of("{" + lines + "wR").find("line 100001, column 1"), std::string::npos);
  EXPECT_EQ(message_of("[1,"), "f.json: not valid JSON: [json.exception.parse_error.101] parse error at line 1, column 4: syntax error while parsing value - unexpected end of input; expected '[', '{', or a literal");
}

TEST(Json, TypedAccessNamesKeyAndValue) {
  const auto object = parse_json(R"({"n": 4.0, "m": 3, "s": "x"})", "config.json");
  EXPECT_EQ(json_get<std::int64_t>(object, "m", "config.json"), 3);
  EXPECT_EQ(json_get<double>(object, "m", "config.json"), 3.0);
  EXPECT_EQ(json_get_or<std::string>(object, "none", "d", "config.json"), "d");
  try {
    json_get<std::int64_t>(object, "n", "config.json");
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "config.json: 'n' must be an integer, got 4.0");
  }
}

}  // namespace
}  // namespace shardtune
