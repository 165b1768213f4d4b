#include "data/dataset.hpp"

#include <cstdlib>

#include "tests/data/data_test_support.hpp"

namespace shardtune {
namespace {

using Ids = std::vector<std::int32_t>;
using Labels = std::vector<std::int64_t>;
using Names = std::vector<std::string>;

class Datasets : public testing::Test {
 protected:
  DatasetOptions options(const std::string& name, std::string_view content) {
    DatasetOptions result;
    result.file = write_file(dir_, name, content);
    return result;
  }
  Names labels_of(const std::string& name, std::string_view content) { return collect_labels(options(name, content)); }
  std::string error(const DatasetOptions& options, const Names& labels = {"a", "b"}, ErrorKind kind = ErrorKind::data) {
    return error_of(
        dir_, [&] { make_classification_dataset(options, labels, tokenizer_); }, kind);
  }
  std::string causal_error(const DatasetOptions& options, ErrorKind kind = ErrorKind::data) {
    return error_of(
        dir_, [&] { make_causal_lm_dataset(options, tokenizer_); }, kind);
  }
  Labels all_labels(const DatasetOptions& options, const Names& labels) {
    const auto dataset = make_classification_dataset(options, labels, tokenizer_);
    Labels result;
    for (std::int64_t i = 0; i < dataset->size(); ++i)
      for (const auto label : dataset->get(i).labels) result.push_back(label);
    return result;
  }
  TempDir dir_;
  WordTokenizer tokenizer_;
};

TEST_F(Datasets, ClassificationGivesTokensTypesAndLabelIndexInFileOrder) {
  const auto dataset = make_classification_dataset(
      options("a.jsonl", "{\"text\":\"w5 w6\",\"label\":\"b\"}\n{\"text\":\"w7\",\"label\":\"a\"}\n"), {"a", "b"},
      tokenizer_);
  ASSERT_EQ(dataset->size(), 2);
  EXPECT_EQ(dataset->get(0).ids, (Ids{1, 5, 6, 2}));
  EXPECT_EQ(dataset->get(0).type_ids, (Ids{0, 0, 0, 0}));
  EXPECT_EQ(dataset->get(0).labels, Labels{1});
  EXPECT_EQ(dataset->get(1).ids, (Ids{1, 7, 2}));
  EXPECT_EQ(dataset->get(1).labels, Labels{0});
}

TEST_F(Datasets, PairsAreEncodedTogetherAndTruncatedToMaxLength) {
  DatasetOptions pair = options("a.tsv", "q\tr\ty\nw5 w6 w7\tw8\ta\n");
  pair.text_column = "q";
  pair.text_pair_column = "r";
  pair.label_column = "y";
  pair.max_length = 6;
  const auto dataset = make_classification_dataset(pair, {"a", "b"}, tokenizer_);
  EXPECT_EQ(dataset->get(0).ids, (Ids{1, 5, 6, 2, 8, 2}));
  EXPECT_EQ(dataset->get(0).type_ids, (Ids{0, 0, 0, 0, 1, 1}));
}

TEST_F(Datasets, LabelsAreOrderedAsRunGlueDoes) {
  EXPECT_EQ(labels_of("a.csv", "text,label\nx,10\nx,9\nx,-1\nx,9\n"), (Names{"-1", "9", "10"}));
  EXPECT_EQ(labels_of("a.csv", "text,label\nx,10\nx,9\nx,b\n"), (Names{"10", "9", "b"}));
  EXPECT_EQ(labels_of("a.csv", "text,label\nx,10\nx,9\nx,007\n"), (Names{"007", "10", "9"}));
  EXPECT_EQ(labels_of("a.jsonl", "{\"label\":10}\n{\"label\":9}\n"), (Names{"9", "10"}));
  EXPECT_EQ(labels_of("a.jsonl", "{\"label\":\"10\"}\n{\"label\":\"9\"}\n"), (Names{"10", "9"}));
  EXPECT_EQ(labels_of("a.jsonl", "{\"label\":\"b\"}\n{\"label\":\"é\"}\n{\"label\":\"B\"}\n"), (Names{"B", "b", "é"}));
  EXPECT_EQ(labels_of("a.jsonl", "{\"label\":true}\n{\"label\":false}\n"), (Names{"false", "true"}));
  DatasetOptions first = options("a.jsonl", "{\"label\":\"b\"}\n{\"label\":\"a\"}\n");
  first.max_rows = 1;
  EXPECT_EQ(collect_labels(first), (Names{"a", "b"}));
}

TEST_F(Datasets, FractionsAreRefusedAsRegression) {
  const auto message = [&](const std::string& name, std::string_view content) {
    return error_of(dir_, [&] { labels_of(name, content); });
  };
  const std::string rest =
      " column 'label' holds numbers with a fraction, which means regression; "
      "text-classification needs names or integers";
  EXPECT_EQ(message("a.csv", "text,label\nx,1\nx,0.5\n"), "a.csv:3:" + rest);
  EXPECT_EQ(message("a.jsonl", "{\"label\":1.0}\n"), "a.jsonl:1:" + rest);
  EXPECT_EQ(labels_of("b.csv", "text,label\nx,v\nx,0.5\n"), (Names{"0.5", "v"}));
}

TEST_F(Datasets, IntegersAreNamesWhereSuchNamesExistAndIndicesElsewhere) {
  const DatasetOptions integers = options("a.jsonl", "{\"text\":\"w5\",\"label\":1}\n{\"text\":\"w5\",\"label\":2}\n");
  EXPECT_EQ(all_labels(integers, {"1", "2"}), (Labels{0, 1}));
  EXPECT_EQ(all_labels(integers, {"a", "b", "c"}), (Labels{1, 2}));
  EXPECT_EQ(all_labels(options("a.tsv", "text\tlabel\nw5\t1\nw6\t0\n"), {"LABEL_0", "LABEL_1"}), (Labels{1, 0}));
  EXPECT_EQ(error(integers, {"0", "1"}), "a.jsonl:2: unknown label '2' in column 'label'; the known labels are: 0, 1");
  EXPECT_EQ(error(integers, {"a", "b"}), "a.jsonl:2: unknown label '2' in column 'label'; the known labels are: a, b");
  EXPECT_EQ(error(options("b.jsonl", "{\"text\":\"w5\",\"label\":\"1\"}\n")),
            "b.jsonl:1: unknown label '1' in column 'label'; the known labels are: a, b");
}

TEST_F(Datasets, UnknownLabelsAndColumnsAreNamedWithFileLineAndWhatExists) {
  EXPECT_EQ(error(options("dev.jsonl", "{\"text\":\"w5\",\"label\":\"a\"}\n\n{\"text\":\"w5\",\"label\":\"zz\"}\n")),
            "dev.jsonl:3: unknown label 'zz' in column 'label'; the known labels are: a, b");
  DatasetOptions wrong = options("a.csv", "text,label\nw5,a\n");
  wrong.label_column = "class";
  EXPECT_EQ(error(wrong), "a.csv:2: no column 'class' (option label_column); the columns here are: label, text");
  EXPECT_EQ(error_of(dir_, [&] { collect_labels(wrong); }),
            "a.csv:2: no column 'class' (option label_column); the columns here are: label, text");
  wrong.label_column = "label";
  wrong.text_column = "sentence";
  EXPECT_EQ(error(wrong), "a.csv:2: no column 'sentence' (option text_column); the columns here are: label, text");
  wrong.text_column = "text";
  wrong.text_pair_column = "other";
  EXPECT_EQ(error(wrong), "a.csv:2: no column 'other' (option text_pair_column); the columns here are: label, text");
  EXPECT_EQ(error(options("b.jsonl", "{\"text\":7,\"label\":\"a\"}\n")),
            "b.jsonl:1: column 'text' must hold a string, not number");
  EXPECT_EQ(error(options("b.jsonl", "{\"text\":\"w5\",\"label\":[1]}\n")),
            "b.jsonl:1: column 'label' must hold a name or an integer, not array");
  EXPECT_EQ(error(options("b.jsonl", "{\"text\":\"w5\",\"label\":null}\n")),
            "b.jsonl:1: column 'label' is null; every row needs a label here");
  EXPECT_EQ(error(options("b.csv", "text,label\nw5,\n")), "b.csv:2: column 'label' is empty");
  const Names many(30, "x");
  EXPECT_EQ(error(options("b.csv", "text,label\nw5,\n"), many, ErrorKind::config),
            "label 'x' appears twice in the list of labels");
}

TEST_F(Datasets, WithoutRequiredLabelsRowsMayLackThemAndThenNoneIsUsed) {
  const auto num_labels = [&](const std::string& name, std::string_view content) {
    DatasetOptions optional = options(name, content);
    optional.require_labels = false;
    return all_labels(optional, {"a", "b"}).size();
  };
  EXPECT_EQ(num_labels("a.txt", "w5\nw6\n"), 0U);
  EXPECT_EQ(num_labels("a.tsv", "text\tlabel\nw5\t-1\nw6\t-1\n"), 0U);
  EXPECT_EQ(num_labels("a.csv", "text,label\nw5,\nw6,\n"), 0U);
  EXPECT_EQ(num_labels("a.jsonl", "{\"text\":\"w5\",\"label\":null}\n{\"text\":\"w5\",\"label\":\"a\"}\n"), 0U);
  EXPECT_EQ(num_labels("a.jsonl", "{\"text\":\"w5\",\"label\":\"b\"}\n{\"text\":\"w5\",\"label\":\"a\"}\n"), 2U);
  DatasetOptions none = options("a.csv", "text,label\nw5,zz\n");
  none.require_labels = false;
  EXPECT_TRUE(all_labels(none, {"a", "b"}).empty());
  EXPECT_EQ(num_labels("b.csv", "text,label\nw5,a\nw6,zz\nw7,b\n"), 0U);
  EXPECT_EQ(num_labels("b.jsonl", "{\"text\":\"w5\",\"label\":0.5}\n"), 0U);
  none.label_column = "";
  EXPECT_TRUE(all_labels(none, {"a", "b"}).empty());
}

TEST_F(Datasets, InputIdsReplaceTextAndAreChecked) {
  const DatasetOptions ids =
      options("a.jsonl", "{\"input_ids\":[1,999,0],\"label\":\"b\"}\n{\"text\":\"w5\",\"label\":\"a\"}\n");
  const auto dataset = make_classification_dataset(ids, {"a", "b"}, tokenizer_);
  EXPECT_EQ(dataset->get(0).ids, (Ids{1, 999, 0}));
  EXPECT_EQ(dataset->get(0).type_ids, (Ids{0, 0, 0}));
  EXPECT_EQ(dataset->get(1).ids, (Ids{1, 5, 2}));
  const auto message = [&](const std::string& value) {
    return error(options("b.jsonl", "{\"input_ids\":" + value + ",\"label\":\"b\"}\n"));
  };
  EXPECT_EQ(message("[1,1000]"), "b.jsonl:1: input_ids[1] = 1000 is no token id; they are integers from 0 to 999");
  EXPECT_EQ(message("[-1]"), "b.jsonl:1: input_ids[0] = -1 is no token id; they are integers from 0 to 999");
  EXPECT_EQ(message("[18446744073709551615]").find("b.jsonl:1: input_ids[0] = 18446744073709551615"), 0U);
  EXPECT_EQ(message("[1.0]"), "b.jsonl:1: input_ids[0] = 1.0 is no token id; they are integers from 0 to 999");
  EXPECT_EQ(message("[]"), "b.jsonl:1: input_ids must be an array of at least one token id");
  EXPECT_EQ(message("7"), "b.jsonl:1: input_ids must be an array of at least one token id");
  DatasetOptions cut = ids;
  cut.max_length = 2;
  EXPECT_EQ(error(cut), "a.jsonl:1: input_ids has 3 tokens, more than max_seq_length 2");
}

TEST_F(Datasets, TheModelsTableDecidesWhichIdsThereAre) {
  DatasetOptions ids = options("a.jsonl", "{\"input_ids\":[1,1023],\"label\":\"b\"}\n");
  ids.num_token_ids = 1024;  // padded to a round number, as many models' tables are
  EXPECT_EQ(make_classification_dataset(ids, {"a", "b"}, tokenizer_)->get(0).ids, (Ids{1, 1023}));
  EXPECT_EQ(make_causal_lm_dataset(ids, tokenizer_)->get(0).ids, (Ids{1, 1023}));
  ids.num_token_ids = 1023;
  EXPECT_EQ(error(ids), "a.jsonl:1: input_ids[1] = 1023 is no token id; they are integers from 0 to 1022");
  DatasetOptions text = options("b.jsonl", "{\"text\":\"w5\"}\n{\"text\":\"w5 w900\"}\n");
  text.num_token_ids = 900;
  EXPECT_EQ(
      causal_error(text),
      "b.jsonl:2: the text has the token id 900, but the model's table has 900 rows; tokenizer and model do not belong "
      "together");
}

TEST_F(Datasets, CausalLabelsAreTheNextTokensAndTheLastIsNotCounted) {
  const auto dataset =
      make_causal_lm_dataset(options("a.jsonl", "{\"text\":\"w5 w6\"}\n{\"input_ids\":[8,9]}\n"), tokenizer_);
  ASSERT_EQ(dataset->size(), 2);
  EXPECT_EQ(dataset->get(0).ids, (Ids{1, 5, 6, 2}));
  EXPECT_EQ(dataset->get(0).labels, (Labels{5, 6, 2, -100}));
  EXPECT_EQ(dataset->get(0).type_ids, (Ids{0, 0, 0, 0}));
  EXPECT_EQ(dataset->get(1).ids, (Ids{8, 9}));
  EXPECT_EQ(dataset->get(1).labels, (Labels{9, -100}));
}

TEST_F(Datasets, CausalRowsAreCutAtMaxLengthAndShortRestsDropped) {
  const WordTokenizer plain(false);
  DatasetOptions cut = options("a.txt", "w10 w11 w12 w13 w14 w15 w16\n\nw20\nw30 w31 w32 w33 w34\n");
  cut.max_length = 3;
  const auto dataset = make_causal_lm_dataset(cut, plain);
  std::vector<Ids> all;
  for (std::int64_t i = 0; i < dataset->size(); ++i) all.push_back(dataset->get(i).ids);
  EXPECT_EQ(all, (std::vector<Ids>{{10, 11, 12}, {13, 14, 15}, {30, 31, 32}, {33, 34}}));
  EXPECT_EQ(dataset->get(1).labels, (Labels{14, 15, -100}));
  cut.max_rows = 1;
  EXPECT_EQ(make_causal_lm_dataset(cut, plain)->size(), 2);
}

TEST_F(Datasets, CausalRowsStayWholeWhereExamplesMustBeRows) {
  const WordTokenizer plain(false);
  DatasetOptions whole = options("a.txt", "w10 w11 w12\nw20\nw30 w31\n");
  whole.one_example_per_row = true;
  whole.max_length = 3;
  const auto dataset = make_causal_lm_dataset(whole, plain);
  ASSERT_EQ(dataset->size(), 3);
  EXPECT_EQ(dataset->get(0).ids, (Ids{10, 11, 12}));
  EXPECT_EQ(dataset->get(1).ids, (Ids{20}));
  EXPECT_EQ(dataset->get(1).labels, (Labels{-100}));
  EXPECT_EQ(dataset->get(2).ids, (Ids{30, 31}));
  const auto message = [&](const std::string& content) {
    DatasetOptions bad = options("b.txt", content);
    bad.one_example_per_row = true;
    bad.max_length = 3;
    return error_of(dir_, [&] { make_causal_lm_dataset(bad, plain); });
  };
  EXPECT_EQ(message("w1\nw1 w2 w3 w4\n"),
            "b.txt:2: the row has 4 tokens, but is needed whole and max_seq_length is 3; split or shorten it");
  EXPECT_EQ(message("w1 w2\n\nw1\n"), "b.txt:2: the text has no tokens; remove the row");
}

TEST_F(Datasets, CausalFilesWithoutAnythingToPredictAreRefused) {
  const WordTokenizer plain(false);
  const DatasetOptions short_rows = options("a.txt", "w10\n\n");
  EXPECT_EQ(error_of(dir_, [&] { make_causal_lm_dataset(short_rows, plain); }),
            "a.txt: no row has the 2 tokens that causal-lm needs");
  DatasetOptions one = options("a.txt", "w10 w11\n");
  one.max_length = 1;
  EXPECT_EQ(causal_error(one, ErrorKind::config),
            "max_seq_length = 1 leaves nothing to predict; causal-lm needs at least 2");
  one.max_length = 0;
  one.text_column = "body";
  EXPECT_EQ(causal_error(one), "a.txt:1: no column 'body' (option text_column); the columns here are: text");
}

TEST_F(Datasets, TextWithoutTokensIsNamedWhenItIsAsked) {
  const WordTokenizer plain(false);
  const auto dataset = make_classification_dataset(options("a.csv", "text,label\nw5,a\n\"\",b\n"), {"a", "b"}, plain);
  EXPECT_EQ(dataset->get(0).ids, Ids{5});
  EXPECT_EQ(error_of(dir_, [&] { dataset->get(1); }), "a.csv:3: the text has no tokens; remove the row");
}

TEST_F(Datasets, ColumnNamesAndMaxRowsAreHonoured) {
  DatasetOptions named = options("a.tsv", "w5 w6\ta\nw7\tb\nw8\tbroken label\n");
  named.column_names = {"s", "y"};
  named.text_column = "s";
  named.label_column = "y";
  named.max_rows = 2;
  EXPECT_EQ(all_labels(named, {"a", "b"}), (Labels{0, 1}));
  named.max_rows = 0;
  EXPECT_EQ(error(named), "a.tsv:3: unknown label 'broken label' in column 'y'; the known labels are: a, b");
  EXPECT_EQ(collect_labels(named), (Names{"a", "b", "broken label"}));
}

TEST_F(Datasets, Sst2AsDistributedIsReadWhole) {
  const char* root = std::getenv("SHARDTUNE_TEST_DATA");
  if (root == nullptr) GTEST_SKIP() << "SHARDTUNE_TEST_DATA is not set";
  DatasetOptions sst2;
  sst2.file = std::filesystem::path(root) / "data/sst2/dev.tsv";
  sst2.column_names = {"text", "label"};
  EXPECT_EQ(collect_labels(sst2), (Names{"0", "1"}));
  EXPECT_EQ(make_classification_dataset(sst2, {"negative", "positive"}, tokenizer_)->size(), 872);
}

}  // namespace
}  // namespace shardtune
