#pragma once
// Rows of a file as examples of a task. Immutable after construction; get() may be called from many threads.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "data/tokenizer.hpp"

namespace shardtune {

// One encoded example. Classification: labels has one entry (class index), or none where the file has no labels.
// Causal LM: labels[t] = the token that position t must predict, -100 = not counted; the last entry is -100.
struct Example {
  std::vector<std::int32_t> ids;
  std::vector<std::int32_t> type_ids;
  std::vector<std::int64_t> labels;
};

class Dataset {
 public:
  virtual ~Dataset() = default;
  virtual std::int64_t size() const = 0;
  virtual Example get(std::int64_t index) const = 0;  // 0 <= index < size(); tokenizes on demand
};

struct DatasetOptions {
  std::filesystem::path file;  // .jsonl/.json, .csv, .tsv or .txt, by extension
  std::string text_column = "text";
  std::string text_pair_column;  // empty = single text
  std::string label_column = "label";
  std::vector<std::string> column_names;  // of CSV and TSV files without a header line
  // false: rows may lack the label column, hold null or -1 there, or a label that the model does not know (score). When
  // any row lacks its label, none is used; one warning says so where some rows have one.
  bool require_labels = true;
  // Causal LM: row i is example i, whole, even with a single token (score). Rows longer than max_length and rows without
  // tokens are refused: Error{data}.
  bool one_example_per_row = false;
  std::int64_t num_token_ids = 0;  // that the model knows; 0 = those of the tokenizer
  std::int64_t max_length = 0;     // truncation in tokens, special tokens counted; 0 = none
  std::int64_t max_rows = 0;       // first rows of the file, 0 = all; what follows is not read
};

// Class names found in the label column of all rows (max_rows does not count), ordered as Hugging Face's run_glue.py
// does: integers by value, names by code point. Integers are JSON integers, or CSV/TSV fields when all of them are;
// they are returned in decimal. Numbers with a fraction mean regression and are refused: Error{data}.
std::vector<std::string> collect_labels(const DatasetOptions& options);

// Every row is read and checked at construction (file, line and column in every message: invalid UTF-8, a line that is
// no JSON object, a missing column, a label not in `labels`, no rows at all); tokenization happens in get().
// A label may be a name in `labels` or, when the file gives an integer and no name in `labels` is one, its index.
// A row may give "input_ids" (array of token ids) instead of text: they are taken as they are, and checked against
// num_token_ids and max_length. The text stays in one byte buffer, 40 bytes a row beside it. The tokenizer must outlive
// the data set.
std::unique_ptr<Dataset> make_classification_dataset(const DatasetOptions& options,
                                                     const std::vector<std::string>& labels,
                                                     const Tokenizer& tokenizer);
// One row = one segment (packing makes concatenation unnecessary); rows longer than max_length are cut into several
// examples of at most max_length tokens. Rows and rests of fewer than 2 tokens carry nothing to predict and are dropped
// (counted in a warning). No token is added beyond what the tokenizer's post-processor adds (as run_clm.py). The number
// of examples depends on the tokens, so here the rows are tokenized at construction, checked against num_token_ids, and
// kept as 4 bytes a token. `one_example_per_row` changes both. max_rows counts rows of the file. text_pair_column and
// label_column are not read.
std::unique_ptr<Dataset> make_causal_lm_dataset(const DatasetOptions& options, const Tokenizer& tokenizer);

}  // namespace shardtune
