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
  std::filesystem::path file;            // .jsonl/.json, .csv, .tsv or .txt, by extension
  std::string text_column = "text";
  std::string text_pair_column;          // empty = single text
  std::string label_column = "label";
  std::vector<std::string> column_names; // of CSV and TSV files without a header line
  bool require_labels = true;            // false: rows may lack the label column altogether (predict)
  std::int64_t max_length = 0;           // truncation in tokens, special tokens counted
  std::int64_t max_rows = 0;             // 0 = all
};

// Class names found in the label column, sorted as Hugging Face's run_glue.py does (numeric labels by number).
std::vector<std::string> collect_labels(const DatasetOptions& options);

// Every row is read and checked at construction (file, line and column in every message: invalid UTF-8, a line that is
// no JSON object, a missing column, a label not in `labels`, no rows at all); tokenization happens in get().
// A label may be a name in `labels` or, when the file gives an integer, its index. The tokenizer must outlive the data set.
std::unique_ptr<Dataset> make_classification_dataset(const DatasetOptions& options, const std::vector<std::string>& labels,
                                                     const Tokenizer& tokenizer);
// One row = one segment (packing makes concatenation unnecessary); rows longer than max_length are cut into several
// examples of at most max_length tokens. Rows of fewer than 2 tokens carry nothing to predict and are dropped (counted
// in a warning).
std::unique_ptr<Dataset> make_causal_lm_dataset(const DatasetOptions& options, const Tokenizer& tokenizer);

}  // namespace shardtune
