#include "checkpoint/safetensors.hpp"

#include <cstring>
#include <fstream>
#include <random>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/file.hpp"
#include "tests/checkpoint/temp_dir.hpp"

namespace shardtune {
namespace {

void put(const std::filesystem::path& file, const std::string& bytes) {
  std::ofstream out(file, std::ios::binary);
  out << bytes;
  ASSERT_TRUE(out.good());
}

std::string file_with_header(const std::string& header, const std::string& data) {
  std::uint64_t size = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &size, 8);
  return bytes + header + data;
}

// What the reader says about these bytes: empty = accepted.
std::string verdict(const TempDir& dir, const std::string& bytes) {
  put(dir / "x.safetensors", bytes);
  try {
    read_safetensors_header(dir / "x.safetensors");
    return "";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::data) << e.what();
    EXPECT_NE(std::string(e.what()).find("x.safetensors"), std::string::npos) << e.what();
    return e.what();
  }
}

#define EXPECT_REFUSED(header, data, why)                                        \
  do {                                                                           \
    const std::string said = verdict(dir, file_with_header(header, data));       \
    EXPECT_NE(said.find(why), std::string::npos) << header << "\n  -> " << said; \
  } while (false)

const std::string kGood =
    R"({"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"e":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]},"b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]},"__metadata__":{"format":"pt"}})";
const std::string kGoodData = std::string("\0\0\x80\x3f\0\0\0\xc0\x40\x40", 10);

TEST(SafetensorsHeader, ReadsShapesDtypesScalarsAndEmptyTensors) {
  TempDir dir;
  put(dir / "g.safetensors", file_with_header(kGood + "   ", kGoodData));
  const auto entries = read_safetensors_header(dir / "g.safetensors");
  ASSERT_EQ(entries.size(), 3u);
  EXPECT_EQ(entries.at("a").shape, (std::vector<std::int64_t>{2, 1}));
  EXPECT_EQ(entries.at("b").numel(), 1);
  EXPECT_EQ(entries.at("e").numel(), 0);
  at::Tensor a = at::zeros({2}), b = at::zeros({1});
  read_safetensors_slice(entries.at("a"), 0, a);
  read_safetensors_slice(entries.at("b"), 0, b);
  EXPECT_EQ(a[0].item<float>(), 1.0F);
  EXPECT_EQ(a[1].item<float>(), -2.0F);
  EXPECT_EQ(b[0].item<float>(), 3.0F);
}

TEST(SafetensorsHeader, TruncationAtEveryLengthIsRefused) {
  TempDir dir;
  const std::string whole = file_with_header(kGood, kGoodData);
  ASSERT_EQ(verdict(dir, whole), "");
  for (std::size_t size = 0; size < whole.size(); ++size) EXPECT_NE(verdict(dir, whole.substr(0, size)), "") << size;
  EXPECT_NE(verdict(dir, whole + "x"), "");
}

TEST(SafetensorsHeader, EveryByteOfTheHeaderMayBeHostileWithoutHarm) {
  TempDir dir;
  const std::string whole = file_with_header(kGood, kGoodData);
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string bytes = whole;
    bytes[random() % (bytes.size() - kGoodData.size())] = static_cast<char>(random());
    refused += verdict(dir, bytes) != "";
  }
  EXPECT_GT(refused, 2000);
}

TEST(SafetensorsHeader, HolesOverlapsAndRestsAreRefused) {
  TempDir dir;
  const std::string data(16, 'x');
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})", data, "hole");
  EXPECT_REFUSED(
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[3],"data_offsets":[4,16]}})",
      data, "overlaps");
  EXPECT_REFUSED(
      R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})",
      data, "overlaps");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", data, "16");
  EXPECT_REFUSED(R"({})", data, "describes 0 bytes");
}

// The shapes of the attacks that are published with the reference implementation, and of its audit.
TEST(SafetensorsHeader, PublishedAttacksAreRefused) {
  TempDir dir;
  // The length of the header lies: it reaches into the data or past the end.
  std::string bytes = file_with_header(kGood, kGoodData);
  for (const std::uint64_t size : {std::uint64_t{1000}, std::uint64_t{std::string_view(kGood).size() + 3}}) {
    std::memcpy(bytes.data(), &size, 8);
    EXPECT_NE(verdict(dir, bytes), "") << size;
  }
  // Any number of tensors on the same bytes: a small file that would become any amount of memory.
  std::string many = "{";
  for (int i = 0; i < 100'000; ++i)
    many += fmt::format(R"({}"weight_{}":{{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", i > 0 ? "," : "", i);
  EXPECT_REFUSED(many + "}", std::string(16, 'x'), "overlaps");
  // Another format hidden in front of, between or behind the tensors.
  const std::string zip = "PK\x03\x04 and more";
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "1234" + zip, "describes 4 bytes");
  EXPECT_REFUSED(fmt::format(R"({{"a":{{"dtype":"U8","shape":[4],"data_offsets":[{},{}]}}}})", zip.size(), zip.size() + 4),
                 zip + "1234", "hole");
  EXPECT_NE(verdict(dir, zip + file_with_header(kGood, kGoodData)), "");
}

TEST(SafetensorsHeader, ANulByteIsNoEndOfTheHeader) {
  TempDir dir;
  EXPECT_REFUSED(std::string("{}  \0 {", 7), "", "NUL byte at byte 4");
}

TEST(SafetensorsHeader, EmptyTensorsMayShareAPlace) {
  TempDir dir;
  put(dir / "e.safetensors", file_with_header(R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},)"
                                              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                              R"("c":{"dtype":"F32","shape":[4,0],"data_offsets":[2,2]},)"
                                              R"("d":{"dtype":"I64","shape":[0,3],"data_offsets":[2,2]}})",
                                              "xy"));
  EXPECT_EQ(read_safetensors_header(dir / "e.safetensors").size(), 4u);
}

TEST(SafetensorsHeader, NumbersThatAreNoSizesAreRefused) {
  TempDir dir;
  const std::string data(16, 'x');
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":["4"],"data_offsets":[0,16]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1.6e1]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[-0,16]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9223372036854775808]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999999999999999999]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}})", data, "do not fit");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16,16]}})", data, "pair");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}})", data, "do not fit");
}

TEST(SafetensorsHeader, OverflowingShapesAreRefused) {
  TempDir dir;
  // 2^32 * 2^32 = 0 modulo 2^64: the wrapped product would pass every later check.
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", "", "overflows");
  EXPECT_REFUSED(R"({"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}})", "", "overflows");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", "", "overflows");
}

TEST(SafetensorsHeader, DtypesMetadataAndStructureAreChecked) {
  TempDir dir;
  const std::string data(16, 'x');
  EXPECT_REFUSED(R"({"a":{"dtype":"F33","shape":[4],"data_offsets":[0,16]}})", data, "unknown dtype 'F33'");
  EXPECT_REFUSED(R"({"a":{"dtype":"F4","shape":[33],"data_offsets":[0,16]}})", data, "whole byte");
  EXPECT_REFUSED(R"({"a":{"dtype":32,"shape":[4],"data_offsets":[0,16]}})", data, "dtype");
  EXPECT_REFUSED(R"({"a":{"shape":[4],"data_offsets":[0,16]}})", data, "lacks 'dtype'");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4]}})", data, "lacks 'data_offsets'");
  EXPECT_REFUSED(R"({"a":[4]})", data, "no object");
  EXPECT_REFUSED(R"({"__metadata__":{"format":1},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", data,
                 "no string");
  EXPECT_EQ(verdict(dir, file_with_header(R"({"__metadata__":null})", "")), "");
  EXPECT_REFUSED(R"({"__metadata__":[],"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", data, "no object");
  EXPECT_REFUSED(
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
      data, "twice");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}})", data, "twice");
  EXPECT_REFUSED("\xef\xbb\xbf{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", data, "begin with");
  EXPECT_EQ(verdict(dir, file_with_header(" \n" + std::string(kGood), kGoodData)), "");  // as the reference has it
  EXPECT_REFUSED(R"([])", data, "begin with");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[[4]],"data_offsets":[0,16]}})", data, "integer");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[[[[[[4]]]]]],"data_offsets":[0,16]}})", data, "nested");
  EXPECT_REFUSED("{\"a\xff\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", data, "not valid JSON");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}})", data, "not valid JSON");
  // A huge header length must be refused before anything of that size is allocated.
  for (const std::uint64_t size :
       {std::uint64_t{100'000'001}, std::uint64_t{1} << 40, ~std::uint64_t{0}, std::uint64_t{5000}}) {
    std::string bytes = file_with_header(kGood, kGoodData);
    std::memcpy(bytes.data(), &size, 8);
    EXPECT_NE(verdict(dir, bytes).find("header of"), std::string::npos) << size;
  }
}

TEST(SafetensorsModel, IndexMayNotLeaveTheDirectory) {
  TempDir dir;
  for (const std::string name :
       {"../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\\\b", "a\\u0000b"}) {
    put(dir / "model.safetensors.index.json", R"({"weight_map":{"a":")" + name + R"("}})");
    EXPECT_THROW(
        try { read_model_headers(dir.path()); } catch (const Error& e) {
          EXPECT_NE(std::string(e.what()).find("plain file names"), std::string::npos) << e.what();
          throw;
        },
        Error)
        << name;
  }
}

TEST(SafetensorsModel, LinksOutOfTheDirectoryAreRefusedButTheHubCacheWorks) {
  TempDir dir;
  std::filesystem::create_directories(dir / "blobs");
  std::filesystem::create_directories(dir / "snapshots/rev");
  put(dir / "blobs/abc", file_with_header(kGood, kGoodData));
  const auto link = dir / "snapshots/rev/model.safetensors";
  std::filesystem::create_symlink("../../blobs/abc", link);
  EXPECT_EQ(read_model_headers(dir / "snapshots/rev").size(), 3u);
  for (const char* target : {"/etc/passwd", "../../abc", "../../blobs/../abc", ".."}) {
    std::filesystem::remove(link);
    std::filesystem::create_symlink(target, link);
    EXPECT_THROW(read_safetensors_header(link), Error) << target;
  }
}

TEST(SafetensorsModel, ShardsOfAnIndexAreReadTogetherAndMissingTensorsNamed) {
  TempDir dir;
  SafetensorsWriter one(dir / "m-00001-of-00002.safetensors", {{"x", "F32", {2}}});
  one.write(at::ones({2}));
  one.commit();
  SafetensorsWriter two(dir / "m-00002-of-00002.safetensors", {{"y", "F32", {3}}});
  two.write(at::ones({3}));
  two.commit();
  put(dir / "model.safetensors.index.json",
      R"({"metadata":{"total_size":20},"weight_map":{"x":"m-00001-of-00002.safetensors","y":"m-00002-of-00002.safetensors"}})");
  EXPECT_EQ(read_model_headers(dir.path()).at("y").numel(), 3);
  put(dir / "model.safetensors.index.json", R"({"weight_map":{"z":"m-00001-of-00002.safetensors"}})");
  EXPECT_THROW(read_model_headers(dir.path()), Error);
}

TEST(SafetensorsModel, MissingFilesSayWhatWasLookedForAndHowToConvertPickles) {
  TempDir dir;
  put(dir / "pytorch_model.bin", "x");
  try {
    read_model_headers(dir.path());
    FAIL();
  } catch (const Error& e) {
    const std::string said = e.what();
    EXPECT_NE(said.find("model.safetensors.index.json"), std::string::npos);
    EXPECT_NE(said.find("save_pretrained"), std::string::npos);
  }
  EXPECT_THROW(read_model_headers(dir / "nowhere"), Error);
}

TEST(SafetensorsSlices, EverySliceOfEveryFloatDtypeIsConverted) {
  TempDir dir;
  const std::int64_t n = 37;
  const at::Tensor values = at::randn({n});
  for (const auto& [name, type, bytes] :
       {std::tuple{"F32", at::kFloat, 4}, {"BF16", at::kBFloat16, 2}, {"F16", at::kHalf, 2}, {"F64", at::kDouble, 8}}) {
    const at::Tensor stored = values.to(type).contiguous();
    const std::string data(static_cast<const char*>(stored.data_ptr()), stored.nbytes());
    // A header of odd length puts the data at an odd address.
    std::string header =
        fmt::format(R"({{"t":{{"dtype":"{}","shape":[{}],"data_offsets":[0,{}]}}}})", name, n, n * bytes);
    if (header.size() % 2 == 0) header += ' ';
    put(dir / "t.safetensors", file_with_header(header, data));
    const auto entry = read_safetensors_header(dir / "t.safetensors").at("t");
    for (std::int64_t offset : {0, 1, 5, 36, 37})
      for (std::int64_t count : {0, 1, 7, 37}) {
        if (offset + count > n) continue;
        at::Tensor got = at::full({count}, 99.0F);
        read_safetensors_slice(entry, offset, got);
        EXPECT_TRUE(at::equal(got, stored.narrow(0, offset, count).to(at::kFloat))) << name << offset << ' ' << count;
      }
  }
}

TEST(SafetensorsSlices, TensorsBeyondOneChunkAreReadWhole) {
  TempDir dir;
  const std::int64_t n = (9 << 20) + 3;
  const at::Tensor values = at::randn({n});
  SafetensorsWriter writer(dir / "t.safetensors", {{"small", "F32", {3}}, {"b", "BF16", {n}}, {"f", "F32", {n}}});
  writer.write(values.narrow(0, 0, 3));
  for (std::int64_t at = 0; at < n; at += 1'000'003)
    writer.write(values.narrow(0, at, std::min<std::int64_t>(1'000'003, n - at)));
  writer.write(values);
  writer.commit();
  const auto entries = read_safetensors_header(dir / "t.safetensors");
  const int before = at::get_num_threads();
  for (const int num_threads : {1, 3}) {
    at::set_num_threads(num_threads);
    at::Tensor got = at::empty({n - 5});
    read_safetensors_slice(entries.at("f"), 5, got);
    EXPECT_TRUE(at::equal(got, values.narrow(0, 5, n - 5)));
    read_safetensors_slice(entries.at("b"), 5, got);
    EXPECT_TRUE(at::equal(got, values.narrow(0, 5, n - 5).to(at::kBFloat16).to(at::kFloat)));
  }
  // Cut off in what only the last thread reads.
  std::filesystem::resize_file(dir / "t.safetensors", std::filesystem::file_size(dir / "t.safetensors") - 100);
  at::Tensor got = at::empty({n});
  EXPECT_THROW(read_safetensors_slice(entries.at("f"), 0, got), Error);
  at::set_num_threads(before);
}

TEST(SafetensorsSlices, DtypesThatAreNoWeightsAreRefused) {
  TempDir dir;
  put(dir / "t.safetensors", file_with_header(R"({"t":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})", "01234567"));
  EXPECT_THROW(read_safetensors_slice(read_safetensors_header(dir / "t.safetensors").at("t"), 0, at::empty({1})),
               Error);
}

TEST(SafetensorsWriter, EmptyTensorsAndZeroItemsAreWritten) {
  TempDir dir;
  SafetensorsWriter writer(dir / "e.safetensors", {{"e0", "F32", {0, 4}}, {"s", "F32", {}}, {"e1", "BF16", {0}}});
  writer.write(at::ones({1}));
  writer.commit();
  EXPECT_EQ(read_safetensors_header(dir / "e.safetensors").size(), 3u);
  EXPECT_EQ(read_file(dir / "e.safetensors").size() % 4, 0u);
  SafetensorsWriter none(dir / "n.safetensors", {});
  none.commit();
  EXPECT_TRUE(read_safetensors_header(dir / "n.safetensors").empty());
}

TEST(SafetensorsWriter, AnUnfinishedFileNeverAppearsAndLeavesNothing) {
  TempDir dir;
  {
    SafetensorsWriter writer(dir / "u.safetensors", {{"a", "F32", {4}}});
    writer.write(at::ones({3}));
    EXPECT_THROW(writer.commit(), Error);
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  EXPECT_THROW(SafetensorsWriter(dir / "nowhere/x.safetensors", {}), Error);
}

}  // namespace
}  // namespace shardtune
