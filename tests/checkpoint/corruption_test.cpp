// Whatever happens to the bytes of a committed checkpoint is found: by verify_checkpoint always, by load whenever the
// bytes are read.
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/manifest.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune {
namespace {

// "good", "refused", or what is wrong with data that were loaded without an error.
std::string load_verdict(const std::filesystem::path& checkpoint, std::int64_t step,
                         const std::vector<TestTensor>& tensors) {
  const auto comm = make_self_communicator();
  StateView view = blank_state(tensors, 0, 1);
  try {
    CheckpointStore(checkpoint.parent_path(), *comm).load(checkpoint, view);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::data) << e.what();
    return "refused";
  }
  const std::string wrong = difference(view, tensors, step, 0, 1);
  return wrong.empty() ? "good" : "silently wrong: " + wrong;
}

class Corruption : public testing::Test {
 protected:
  void SetUp() override {
    save_test_state(dir_.path(), 1, 2, tensors_);
    save_test_state(dir_.path(), 2, 2, tensors_);
    for (const auto& entry : std::filesystem::directory_iterator(checkpoint_)) files_.push_back(entry.path());
    std::sort(files_.begin(), files_.end());
    ASSERT_EQ(files_.size(), 2u + 2 + 3 + 1);
    ASSERT_TRUE(verify_checkpoint(checkpoint_).empty());
  }
  static bool is_read_by_load(const std::filesystem::path& file) {
    return file.extension() == ".h5" || file.extension() == ".xxh3" || file.filename() == "manifest.json";
  }

  TempDir dir_;
  const std::vector<TestTensor> tensors_ = test_tensors();
  const std::filesystem::path checkpoint_ = dir_ / "checkpoint-2";
  std::vector<std::filesystem::path> files_;
  std::mt19937 random_{12345};
};

// SHARDTUNE_FLIPS sets the number of flips (100,000); "all" flips every bit of every file in turn.
TEST_F(Corruption, EveryFlippedBitIsFound) {
  const char* wanted = std::getenv("SHARDTUNE_FLIPS");
  const bool flips_all = wanted != nullptr && std::string(wanted) == "all";
  const std::size_t per_file = (wanted != nullptr && !flips_all ? std::stoul(wanted) : 100'000) / 7 + 1;
  std::size_t flips = 0;
  for (const auto& file : files_) {
    const std::string bytes = read_file(file);
    if (bytes.empty()) continue;
    const UniqueFd fd(::open(file.c_str(), O_RDWR));
    ASSERT_TRUE(fd);
    const std::size_t num_bits = bytes.size() * 8, wanted_flips = flips_all ? num_bits : per_file;
    for (std::size_t i = 0; i < wanted_flips; ++i) {
      const std::size_t bit = flips_all ? i : random_() % num_bits;
      const auto at = static_cast<off_t>(bit / 8);
      const char flipped = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
      ASSERT_EQ(::pwrite(fd.get(), &flipped, 1, at), 1);
      const auto problems = verify_checkpoint(checkpoint_);
      ASSERT_FALSE(problems.empty()) << file << " bit " << bit;
      // The file is named; a damaged table may be blamed by its shard's name or its own.
      ASSERT_NE(problems[0].find(file.extension() == ".xxh3" ? file.stem().string() : file.filename().string()),
                std::string::npos)
          << problems[0];
      if (i % 8 == 0 || flips_all) {
        ASSERT_EQ(load_verdict(checkpoint_, 2, tensors_), is_read_by_load(file) ? "refused" : "good")
            << file << " bit " << bit;
      }
      ASSERT_EQ(::pwrite(fd.get(), &bytes[bit / 8], 1, at), 1);
      ++flips;
    }
  }
  std::printf("  %zu flips\n", flips);
  EXPECT_GE(flips, 7 * std::min<std::size_t>(per_file, 700));
  EXPECT_TRUE(verify_checkpoint(checkpoint_).empty());
  EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), "good");
}

TEST_F(Corruption, EveryPageOfZerosIsFound) {
  int pages = 0;
  for (const auto& file : files_) {
    const std::string bytes = read_file(file);
    const UniqueFd fd(::open(file.c_str(), O_RDWR));
    for (std::size_t at = 0; at < bytes.size(); at += 4096) {
      const std::string page = bytes.substr(at, 4096);
      if (page == std::string(page.size(), '\0')) continue;
      const std::string zeros(page.size(), '\0');
      ASSERT_EQ(::pwrite(fd.get(), zeros.data(), zeros.size(), static_cast<off_t>(at)),
                static_cast<ssize_t>(zeros.size()));
      EXPECT_FALSE(verify_checkpoint(checkpoint_).empty()) << file << " page at " << at;
      EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), is_read_by_load(file) ? "refused" : "good")
          << file << " page at " << at;
      ASSERT_EQ(::pwrite(fd.get(), page.data(), page.size(), static_cast<off_t>(at)),
                static_cast<ssize_t>(page.size()));
      ++pages;
    }
  }
  EXPECT_GT(pages, 10);
  EXPECT_TRUE(verify_checkpoint(checkpoint_).empty());
}

TEST_F(Corruption, EveryTruncationAndExtensionIsFound) {
  for (const auto& file : files_) {
    const std::string bytes = read_file(file);
    for (int i = 0; i < 150; ++i) {
      if (bytes.empty()) break;
      const std::size_t size =
          i < 20 ? bytes.size() - 1 - static_cast<std::size_t>(i) % bytes.size() : random_() % bytes.size();
      std::filesystem::resize_file(file, size);
      EXPECT_FALSE(verify_checkpoint(checkpoint_).empty()) << file << ' ' << size;
      EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), is_read_by_load(file) ? "refused" : "good")
          << file << ' ' << size;
      std::ofstream(file, std::ios::binary) << bytes;
    }
    std::ofstream(file, std::ios::binary) << bytes << '\0';
    EXPECT_FALSE(verify_checkpoint(checkpoint_).empty()) << file << " extended";
    std::ofstream(file, std::ios::binary) << bytes;
    EXPECT_TRUE(verify_checkpoint(checkpoint_).empty()) << file;
  }
}

TEST_F(Corruption, DeletedSwappedAndStaleFilesAreFound) {
  for (const auto& file : files_) {
    const std::filesystem::path aside = file.string() + ".aside";
    std::filesystem::rename(file, aside);
    EXPECT_FALSE(verify_checkpoint(checkpoint_).empty()) << file << " deleted";
    EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), is_read_by_load(file) ? "refused" : "good") << file;
    std::filesystem::create_directory(file);
    EXPECT_FALSE(verify_checkpoint(checkpoint_).empty()) << file << " is a directory";
    std::filesystem::remove(file);
    // The same file of the step before: right in itself, wrong here.
    const std::filesystem::path stale = dir_ / "checkpoint-1" / file.filename();
    if (read_file(stale) != read_file(aside)) {
      std::filesystem::copy_file(stale, file);
      EXPECT_FALSE(verify_checkpoint(checkpoint_).empty()) << file << " stale";
      EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), "refused") << file;
    }
    std::filesystem::rename(aside, file);
  }
  for (const char* suffix : {"", ".xxh3"}) {
    const auto a = checkpoint_ / (std::string("shard-00000-of-00002.h5") + suffix);
    const auto b = checkpoint_ / (std::string("shard-00001-of-00002.h5") + suffix);
    for (int back = 0; back < 2; ++back) {
      std::filesystem::rename(a, dir_ / "c");
      std::filesystem::rename(b, a);
      std::filesystem::rename(dir_ / "c", b);
      EXPECT_EQ(verify_checkpoint(checkpoint_).empty(), back == 1) << suffix;
      EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), back == 1 ? "good" : "refused") << suffix;
    }
  }
}

// A shard and its table both from the step before fit each other, but not the manifest.
TEST_F(Corruption, AStalePairOfShardAndTableIsFound) {
  for (const char* name : {"shard-00001-of-00002.h5", "shard-00001-of-00002.h5.xxh3"})
    std::filesystem::copy_file(dir_ / "checkpoint-1" / name, checkpoint_ / name,
                               std::filesystem::copy_options::overwrite_existing);
  EXPECT_EQ(verify_checkpoint(checkpoint_).size(), 1u);
  EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), "refused");
}

// One shard with its table in the place of another too.
TEST_F(Corruption, ADuplicatedShardIsFound) {
  for (const char* suffix : {"", ".xxh3"})
    std::filesystem::copy_file(checkpoint_ / (std::string("shard-00000-of-00002.h5") + suffix),
                               checkpoint_ / (std::string("shard-00001-of-00002.h5") + suffix),
                               std::filesystem::copy_options::overwrite_existing);
  EXPECT_EQ(verify_checkpoint(checkpoint_).size(), 1u);
  EXPECT_EQ(load_verdict(checkpoint_, 2, tensors_), "refused");
}

TEST(CorruptionOfLargeFiles, OnlyBlocksThatAreReadMatterToALoad) {
  TempDir dir;
  const std::vector<TestTensor> tensors = test_tensors(4000);  // about 20 MB in 2 shards
  save_test_state(dir.path(), 1, 2, tensors);
  const auto checkpoint = dir / "checkpoint-1";
  const auto file = checkpoint / "shard-00000-of-00002.h5";
  const auto size = std::filesystem::file_size(file);
  ASSERT_GT(size, 8U << 20);
  std::mt19937 random(5);
  const UniqueFd fd(::open(file.c_str(), O_RDWR));
  for (int i = 0; i < 60; ++i) {
    const auto at = static_cast<off_t>(random() % size);
    char byte = 0;
    ASSERT_EQ(::pread(fd.get(), &byte, 1, at), 1);
    const char flipped = static_cast<char>(byte ^ 0x10);
    ASSERT_EQ(::pwrite(fd.get(), &flipped, 1, at), 1);
    EXPECT_FALSE(verify_checkpoint(checkpoint).empty());
    EXPECT_EQ(load_verdict(checkpoint, 1, tensors).rfind("silently", 0), std::string::npos);
    ASSERT_EQ(::pwrite(fd.get(), &byte, 1, at), 1);
  }
  EXPECT_EQ(load_verdict(checkpoint, 1, tensors), "good");
}

// A manifest whose checksum was made to hold: parsed into something consistent or refused, never a crash.
TEST(HostileManifest, AnyBodyIsParsedConsistentlyOrRefused) {
  TempDir dir;
  save_test_state(dir.path(), 1, 2, test_tensors());
  const std::string good = read_file(dir / "checkpoint-1/manifest.json");
  const std::string body = good.substr(0, good.rfind(",\"checksum\""));
  std::mt19937 random(99);
  int refused = 0;
  const std::string alphabet = "0123456789-.,:[]{}\"eE/\\ ntf";
  for (int i = 0; i < 8000; ++i) {
    std::string text = body;
    for (unsigned n = 0; n <= random() % 3; ++n) {
      const std::size_t at = random() % text.size();
      if (random() % 3 == 0)
        text.erase(at, random() % 5);
      else if (random() % 2 == 0)
        text.insert(at, 1, alphabet[random() % alphabet.size()]);
      else
        text[at] = alphabet[random() % alphabet.size()];
    }
    try {
      const Manifest manifest = parse_manifest(text + ",\"checksum\":\"" + to_hex(hash_bytes(text)) + "\"}\n", "m");
      for (const ManifestTensor& tensor : manifest.tensors) {
        std::int64_t covered = 0;
        for (const ManifestSlice& slice : tensor.slices) {
          ASSERT_EQ(slice.offset, covered);
          ASSERT_LE(slice.byte_offset + static_cast<std::uint64_t>(slice.numel) * 4,
                    manifest.files.at(slice.file).size);
          covered += slice.numel;
        }
        ASSERT_EQ(covered, tensor.numel());
      }
    } catch (const Error& e) {
      ASSERT_EQ(e.kind(), ErrorKind::data) << e.what();
      ++refused;
    }
  }
  EXPECT_GT(refused, 4000);
}

TEST(Manifest, ARefusalNamesTheValue) {
  TempDir dir;
  save_test_state(dir.path(), 1, 2, test_tensors());
  const std::string good = read_file(dir / "checkpoint-1/manifest.json");
  const std::string body = good.substr(0, good.rfind(",\"checksum\""));
  const std::pair<const char*, std::pair<const char*, const char*>> cases[] = {
      {"\"config.json\"", {"\"../config.json\"", "the file name \"../config.json\" is not plain"}},
      {"\"config.json\"", {"\"tokenizer.json\"", "the file \"tokenizer.json\" is listed twice"}},
      {"\"config.json\"", {"\"\\u0007\\n\\u00e4/\"", "the file name \"\\u0007\\n\\u00e4/\" is not plain"}},
      {"\"digest\":\"", {"\"digest\":\"x", "the digest \"x"}},
      {"\"size\":", {"\"size\":-", "is negative: -"}}};
  for (const auto& [what, change] : cases) {
    std::string text = body;
    text.replace(text.find(what), std::strlen(what), change.first);
    const std::string said = testing_support::error_of(
        ErrorKind::data, [&] { parse_manifest(text + ",\"checksum\":\"" + to_hex(hash_bytes(text)) + "\"}\n", "m"); });
    EXPECT_NE(said.find(change.second), std::string::npos) << said;
  }
}

// Removes itself, also when a test ends early.
struct ScopedHook {
  explicit ScopedHook(SavePhaseHook hook) { set_save_phase_hook(std::move(hook)); }
  ScopedHook(const ScopedHook&) = delete;
  ScopedHook& operator=(const ScopedHook&) = delete;
  ~ScopedHook() { set_save_phase_hook(nullptr); }
};

// Between memory and the disk: before the file is synced a bit of it changes, once for the first, the middle and the
// last byte of every slice; blocks of the block table are covered by one slice, by many, by those of two ranks, and
// partly by HDF5's own bytes.
class ReadBack : public testing::TestWithParam<int> {};

TEST_P(ReadBack, FindsWhatChangedOnItsWayToTheDisk) {
  const std::vector<TestTensor> tensors = test_tensors(2000);  // 6 MB for the largest
  TempDir dir;
  const auto save_into_one_file = [&] { save_test_state(dir.path(), 1, GetParam(), tensors, GetParam()); };
  save_into_one_file();
  const std::string good = read_file(dir / "checkpoint-1/shard-00000-of-00001.h5");
  std::set<std::size_t> positions;
  for (int rank = 0; rank < GetParam(); ++rank) {
    for (const StateSlice& slice : expected_state(tensors, 1, rank, GetParam()).slices) {
      const std::string_view bytes(static_cast<const char*>(slice.data.const_data_ptr()), slice.data.nbytes());
      if (bytes.empty()) continue;
      const std::size_t begin = good.find(bytes);
      ASSERT_NE(begin, std::string::npos) << slice.name;
      positions.insert({begin, begin + bytes.size() / 2, begin + bytes.size() - 1});
    }
  }
  std::filesystem::remove_all(dir / "checkpoint-1");
  for (const std::size_t position : positions) {
    std::atomic<int> num_closed = 0;
    const ScopedHook hook([&](const char* phase, std::int64_t) {
      if (std::string_view(phase) != "shard_closed" || ++num_closed < GetParam()) return;
      const UniqueFd fd(::open((dir / "checkpoint-1.partial/shard-00000-of-00001.h5.tmp").c_str(), O_RDWR));
      const char changed = static_cast<char>(good[position] ^ 4);
      EXPECT_EQ(::pwrite(fd.get(), &changed, 1, static_cast<off_t>(position)), 1) << std::strerror(errno);
    });
    const std::string said = testing_support::error_of(ErrorKind::io, save_into_one_file);
    EXPECT_NE(said.find("what was read back is not what was written"), std::string::npos) << position << ": " << said;
    ASSERT_FALSE(std::filesystem::exists(dir / "checkpoint-1"));
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, ReadBack, testing::Values(1, 2));

}  // namespace
}  // namespace shardtune
