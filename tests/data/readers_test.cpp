#include "data/readers.hpp"

#include <sstream>

#include <nlohmann/json.hpp>

#include "core/rng.hpp"
#include "data/utf8.hpp"
#include "tests/data/data_test_support.hpp"

namespace shardtune {
namespace {

using nlohmann::json;

// Rows with their lines as one JSON value: [[line, row], ...].
json rows_of(const std::filesystem::path& file, const std::vector<std::string>& names = {}, std::int64_t max_rows = 0) {
  json rows = json::array();
  read_rows(
      file,
      [&](json&& row, std::int64_t line) {
        rows.push_back({line, row});
      },
      names, max_rows);
  return rows;
}

class Readers : public testing::Test {
 protected:
  json read(const std::string& name, std::string_view content, const std::vector<std::string>& names = {},
            std::int64_t max_rows = 0) {
    return rows_of(write_file(dir_, name, content), names, max_rows);
  }
  std::string error(const std::string& name, std::string_view content, const std::vector<std::string>& names = {}) {
    const auto file = write_file(dir_, name, content);
    return error_of(dir_, [&] { rows_of(file, names); });
  }
  TempDir dir_;
};

TEST_F(Readers, JsonLinesSkipBlankLinesAndAcceptCrlfMarkAndMissingLastNewline) {
  EXPECT_EQ(read("a.jsonl", "\xEF\xBB\xBF{\"text\":\"a\",\"n\":1}\r\n\n  \t\r\n{\"text\":\"b\\u00e9\"}"),
            json::parse(R"([[1,{"text":"a","n":1}],[4,{"text":"bé"}]])"));
  EXPECT_EQ(read("a.JSONL", "{\"text\":\"a\\u0000b\"}\n")[0][1]["text"], std::string("a\0b", 3));
}

TEST_F(Readers, JsonArraysKeepTheLineOfEachRow) {
  const json expected = json::parse(R"([[2,{"t":"a]}\"[","x":[{"y":1}]}],[3,{"t":"b"}],[5,{"t":"c"}]])");
  EXPECT_EQ(read("a.json", " [\n{\"t\":\"a]}\\\"[\",\"x\":[{\"y\":1}]},\r\n{\n\"t\":\"b\"},\n{\"t\":\"c\"}]\n"),
            expected);
  EXPECT_EQ(read("b.json", "\n{\"t\":1}\n{\"t\":2}\n"), json::parse(R"([[2,{"t":1}],[3,{"t":2}]])"));
}

TEST_F(Readers, CsvFollowsRfc4180) {
  EXPECT_EQ(read("a.csv", "text,label\r\n\"a, \"\"b\"\"\r\nc\",x\r\n\r\nplain \"quote,\"\"\n,\n"),
            json::parse(R"([[2,{"text":"a, \"b\"\r\nc","label":"x"}],[5,{"text":"plain \"quote","label":""}],
                            [6,{"text":"","label":""}]])"));
  EXPECT_EQ(read("b.csv", "t\n\"\"\nlast"), json::parse(R"([[2,{"t":""}],[3,{"t":"last"}]])"));
}

TEST_F(Readers, TsvKnowsNoQuotesAndTakesColumnNamesInsteadOfAHeader) {
  EXPECT_EQ(read("a.tsv", "text\tlabel\n\"a\t0\r\nb \"\" c\t1"),
            json::parse(R"([[2,{"text":"\"a","label":"0"}],[3,{"text":"b \"\" c","label":"1"}]])"));
  EXPECT_EQ(read("b.tsv", "one\t0\n\ntwo\t1\n", {"s", "y"}),
            json::parse(R"([[1,{"s":"one","y":"0"}],[3,{"s":"two","y":"1"}]])"));
  EXPECT_EQ(read("b.csv", "one,0\n", {"s", "y"}), json::parse(R"([[1,{"s":"one","y":"0"}]])"));
}

TEST_F(Readers, TextFilesGiveOneRowALineBlankOnesToo) {
  EXPECT_EQ(read("a.txt", "a\r\n\n b\t"), json::parse(R"([[1,{"text":"a"}],[2,{"text":""}],[3,{"text":" b\t"}]])"));
}

TEST_F(Readers, MaxRowsStopsBeforeWhatFollowsIsRead) {
  EXPECT_EQ(read("a.jsonl", "{\"t\":1}\n{\"t\":2}\nbroken", {}, 2).size(), 2U);
  EXPECT_EQ(read("a.csv", "t,u\n1,2\n3\n", {}, 1).size(), 1U);
  EXPECT_EQ(read("a.txt", "1\n\xff", {}, 1).size(), 1U);
  EXPECT_EQ(read("a.json", "[{\"t\":1},{\"t\":2} broken", {}, 2).size(), 2U);
}

TEST_F(Readers, LinesLongerThanTheReadBufferArriveWhole) {
  std::string content;
  std::vector<std::size_t> lengths{0, 1, (1U << 17) - 1, 1U << 17, (1U << 17) + 1, (5U << 17) + 3, 2, 0, 7};
  for (const std::size_t length : lengths) content += std::string(length, 'x') + "\n";
  const json rows = read("a.txt", content);
  ASSERT_EQ(rows.size(), lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i)
    EXPECT_EQ(rows[i][1]["text"].get_ref<const std::string&>().size(), lengths[i]);
}

TEST_F(Readers, InvalidUtf8IsRefusedWithFileLineAndByteColumn) {
  EXPECT_EQ(error("a.txt", "fine\nab\xC3\xA9\xFFz\n"), "a.txt:2:5: invalid UTF-8 (byte 0xff); the file must be UTF-8");
  EXPECT_EQ(error("a.csv", "t\nok\n\xC0\xAF\n"), "a.csv:3:1: invalid UTF-8 (byte 0xc0); the file must be UTF-8");
  EXPECT_EQ(error("a.jsonl", "{\"t\":\"\xED\xA0\x80\"}\n"),
            "a.jsonl:1:7: invalid UTF-8 (byte 0xed); the file must be UTF-8");
  EXPECT_EQ(error("a.tsv", "t\ncut \xE2\x82"), "a.tsv:2:5: invalid UTF-8 (byte 0xe2); the file must be UTF-8");
  EXPECT_EQ(error("b.txt", std::string_view("a\0b\n", 4)), "b.txt:1:2: NUL byte; is the file binary or UTF-16?");
  EXPECT_EQ(error("c.txt", std::string_view("\xFF\xFE"
                                            "a\0",
                                            4)),
            "c.txt:1:1: the file is UTF-16 (byte order mark); convert it to UTF-8, for example with iconv -f UTF-16 -t "
            "UTF-8");
}

TEST_F(Readers, BrokenJsonIsRefusedWithItsLine) {
  EXPECT_EQ(error("a.jsonl", "{\"t\":1}\n{\"t\":\n").find("a.jsonl:2: not valid JSON: at column"), 0U);
  EXPECT_EQ(error("a.jsonl", "{\"t\":1} {\"t\":2}\n").find("a.jsonl:1: not valid JSON: at column 9"), 0U);
  EXPECT_EQ(error("a.jsonl", "\n[1]\n"),
            "a.jsonl:2: a row must be a JSON object such as {\"text\": \"...\"}, this is an array");
  EXPECT_EQ(error("a.jsonl", "\"x\"\n"),
            "a.jsonl:1: a row must be a JSON object such as {\"text\": \"...\"}, this is a string");
  EXPECT_EQ(error("a.jsonl", "plain text\n").find("a.jsonl:1: not valid JSON"), 0U);
  EXPECT_EQ(error("a.jsonl", "{\"t\":1,\"t\":2}\n"), "a.jsonl:1: JSON key 't' appears twice in one object");
  EXPECT_EQ(error("a.jsonl", "{\"t\":\"\\ud800\"}\n").find("a.jsonl:1: not valid JSON"), 0U);
  EXPECT_EQ(error("a.jsonl", "{\"t\":" + std::string(100000, '[') + "\n"), "a.jsonl:1: JSON is nested deeper than 64");
}

TEST_F(Readers, BrokenJsonArraysAreRefusedWithTheLineOfTheRow) {
  EXPECT_EQ(error("a.json", "[{\"t\":1}\n{\"t\":2}]"), "a.json:2:1: expected ',' or ']' in a JSON array of objects");
  EXPECT_EQ(error("a.json", "[{\"t\":1},\n]"), "a.json:2:1: expected an object '{' in a JSON array of objects");
  EXPECT_EQ(error("a.json", "[1]"), "a.json:1:2: expected an object '{' in a JSON array of objects");
  EXPECT_EQ(error("a.json", "[{\"t\":1}] x"), "a.json:1:11: expected nothing after ']' in a JSON array of objects");
  EXPECT_EQ(error("a.json", "[{\"t\":1}\n\n"), "a.json:2: the JSON array is not closed with ']'");
  EXPECT_EQ(error("a.json", "[\n{\"t\":[1}]\n").find("a.json:2: not valid JSON: at column 8"), 0U);
  EXPECT_EQ(error("a.json", "[\n{\"t\":[1]\n,\n"), "a.json:2: the JSON object that begins here is never closed");
  EXPECT_EQ(error("a.json", "[\n{\"t\":[1]}, {\"t\" 5}]\n").find("a.json:2: not valid JSON: at column 6"), 0U);
  EXPECT_EQ(error("a.json", "[]"), "a.json:1: the file holds no rows");
}

TEST_F(Readers, BrokenTablesAreRefusedWithTheirLine) {
  EXPECT_EQ(error("a.csv", "text,label\na,b\nc\n"), "a.csv:3: 1 column, but the header has 2 (text, label)");
  EXPECT_EQ(error("a.tsv", "a\tb\tc\n", {"s", "y"}), "a.tsv:1: 3 columns, but column_names gives 2 (s, y)");
  EXPECT_EQ(error("a.csv", "t,u\n\"a\nb\",1\n\"c,2\n"), "a.csv:4:1: the quote that opens here is never closed");
  EXPECT_EQ(error("a.csv", "t,u\n\"a\"b,1\n"), "a.csv:2:4: a comma or the end of the line must follow a closing quote");
  EXPECT_EQ(error("a.csv", "t\na\rb\n"), "a.csv:2:2: carriage return inside an unquoted field");
  EXPECT_EQ(error("a.csv", "t,t\n1,2\n"), "a.csv:1: column 't' appears twice");
  EXPECT_EQ(error("a.csv", "t,\n1,2\n"), "a.csv:1: column 2 of the header has no name");
}

TEST_F(Readers, FilesWithoutRowsAreRefused) {
  for (const char* name : {"a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"})
    EXPECT_EQ(error(name, ""), std::string(name) + ":1: the file is empty");
  EXPECT_EQ(error("a.csv", "text,label\n"), "a.csv:1: the file holds no rows");
  EXPECT_EQ(error("a.jsonl", "\n\n"), "a.jsonl:2: the file holds no rows");
  EXPECT_EQ(error("a.txt", "\xEF\xBB\xBF"), "a.txt:1: the file holds no rows");
}

TEST_F(Readers, MissingFilesDirectoriesAndUnknownExtensionsAreNamed) {
  EXPECT_EQ(error_of(dir_, [&] { rows_of(dir_ / "none.csv"); }), "cannot open none.csv: No such file or directory");
  std::filesystem::create_directory(dir_ / "d.csv");
  EXPECT_EQ(error_of(dir_, [&] { rows_of(dir_ / "d.csv"); }), "d.csv is a directory, a file is needed");
  EXPECT_EQ(
      error("a.parquet", "x"),
      "a.parquet: unknown kind of data file '.parquet'; the extension must be one of .jsonl, .json, .csv, .tsv, .txt");
}

TEST_F(Readers, RowsAboveTheByteLimitAreRefusedInEveryFormat) {
  const std::string big(kMaxRowBytes + 1, 'x');
  EXPECT_EQ(error("a.txt", "ok\n" + big), "a.txt:2: the line is longer than the limit of 67108864 bytes");
  EXPECT_EQ(error("a.json", "[{\"t\":\"" + big + "\"}]"),
            "a.json:1: the row is longer than the limit of 67108864 bytes");
  std::string quoted = "t\n\"";
  const std::string piece((1U << 20) - 1, 'x');
  for (int i = 0; i < 65; ++i) (quoted += piece) += '\n';
  EXPECT_EQ(error("a.csv", quoted + "\"\n"),
            "a.csv:2: the quoted field that begins here is longer than 67108864 bytes");
}

TEST_F(Readers, WhatTheHandlerThrowsPassesThrough) {
  const auto file = write_file(dir_, "a.txt", "x\ny\n");
  EXPECT_THROW(read_rows(file, [](json&&, std::int64_t) { throw std::logic_error("handler"); }), std::logic_error);
}

// Any table of hostile fields, written with and without needless quotes, LF or CRLF, comes back as it was.
TEST_F(Readers, CsvOfRandomFieldsRoundTrips) {
  constexpr std::string_view kPieces[] = {
      "a", "\"", ",", "\n", "\r\n", "é", " ", "\"\"", "\t", "'", "\xF0\x9F\x99\x82"};
  PhiloxStream random(20261);
  for (int round = 0; round < 300; ++round) {
    const std::size_t num_columns = 1 + random.next_below(4), num_rows = 1 + random.next_below(6);
    const std::string newline = random.next_below(2) == 0 ? "\n" : "\r\n";
    std::string content;
    json expected = json::array();
    for (std::size_t c = 0; c < num_columns; ++c) content += (c == 0 ? "c" : ",c") + std::to_string(c);
    content += newline;
    for (std::size_t r = 0; r < num_rows; ++r) {
      json row = json::object();
      for (std::size_t c = 0; c < num_columns; ++c) {
        std::string field, escaped;
        for (auto n = random.next_below(7); n > 0; --n) field += kPieces[random.next_below(std::size(kPieces))];
        for (const char ch : field) escaped += ch == '"' ? "\"\"" : std::string(1, ch);
        const bool needs_quotes =
            field.find_first_of(",\"\r\n") != std::string::npos || (num_columns == 1 && field.empty());
        if (c > 0) content += ',';
        content += needs_quotes || random.next_below(2) == 0 ? "\"" + escaped + "\"" : field;
        row["c" + std::to_string(c)] = field;
      }
      if (r + 1 < num_rows || random.next_below(2) == 0) content += newline;
      expected.push_back(row);
    }
    json got = json::array();
    for (const json& row : read("fuzz.csv", content)) got.push_back(row[1]);
    ASSERT_EQ(got, expected) << content;
  }
}

// Random bytes end in rows or in an Error that names the file, never in anything else.
TEST_F(Readers, RandomBytesNeverCrashAnyReader) {
  constexpr std::string_view kPieces[] = {"{",  "}",  "[",    "]",        "\"t\":", "1", ",", "\n",
                                          "\"", "\\", "\xff", "\xC3\xA9", "\r",     "t", "\t"};
  PhiloxStream random(77);
  int num_accepted = 0, num_refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string content = round % 2 == 0 ? "" : "[{";
    for (auto n = random.next_below(12); n > 0; --n) content += kPieces[random.next_below(std::size(kPieces))];
    for (const char* name : {"f.jsonl", "f.json", "f.csv", "f.tsv", "f.txt"}) {
      try {
        read(name, content);
        ++num_accepted;
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::data);
        EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
        ++num_refused;
      }
    }
  }
  EXPECT_GT(num_accepted, 100);
  EXPECT_GT(num_refused, 100);
}

TEST(Utf8, AcceptsEveryCodePointButSurrogatesAndRefusesCutAndOverlongSequences) {
  const auto is_valid = [](std::string_view text) { return valid_utf8_prefix(text) == text.size(); };
  for (std::uint32_t code = 0; code <= 0x110000; ++code) {
    std::string text;
    const auto put = [&](std::uint32_t value) { text += static_cast<char>(value); };
    if (code < 0x80)
      put(code);
    else if (code < 0x800)
      put(0xC0 | code >> 6), put(0x80 | (code & 63));
    else if (code < 0x10000)
      put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
    else
      put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 63)), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
    const bool expected = (code < 0xD800 || code > 0xDFFF) && code < 0x110000;
    ASSERT_EQ(is_valid(text), expected) << code;
    if (text.size() > 1) {
      ASSERT_EQ(valid_utf8_prefix("12345678" + text.substr(0, text.size() - 1)), 8U) << code;
    }
  }
  for (const char* overlong : {"\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xF0\x8F\xBF\xBF", "\x80", "\xF5\x80\x80\x80"})
    EXPECT_EQ(valid_utf8_prefix(overlong), 0U);
  EXPECT_EQ(utf8_head("a\xC3\xA9z", 2), "a");
  EXPECT_EQ(utf8_head("a\xC3\xA9z", 3), "a\xC3\xA9");
}

}  // namespace
}  // namespace shardtune
