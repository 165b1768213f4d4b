#include "data/dataset.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <optional>
#include <set>
#include <string_view>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/log.hpp"
#include "data/readers.hpp"
#include "data/utf8.hpp"

namespace shardtune {
namespace {

constexpr std::int32_t kNoLabel = -1;
constexpr const char* kInputIds = "input_ids";

[[noreturn]] void refuse(const DatasetOptions& options, std::int64_t line, const std::string& what) {
  fail(ErrorKind::data, fmt::format("{}:{}: {}", options.file.string(), line, what));
}

std::string shortened(std::string_view text, std::size_t max_bytes = 80) {
  if (text.size() <= max_bytes) return std::string(text);
  return std::string(utf8_head(text, max_bytes)) + "...";
}

std::string listed(const std::vector<std::string>& names) {
  constexpr std::size_t kMaxNames = 20;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kMaxNames); ++i)
    text += (i == 0 ? "" : ", ") + shortened(names[i]);
  if (names.size() > kMaxNames) text += fmt::format(" and {} more", names.size() - kMaxNames);
  return text;
}

void validate(const DatasetOptions& options) {
  if (options.max_length < 0)
    fail(ErrorKind::config, fmt::format("max_seq_length must be >= 0 (got {})", options.max_length));
  if (options.max_rows < 0)
    fail(ErrorKind::config, fmt::format("the number of rows to use must be >= 0 (got {})", options.max_rows));
  if (options.text_column.empty()) fail(ErrorKind::config, "text_column is empty; name the column that holds the text");
  if (options.require_labels && options.label_column.empty())
    fail(ErrorKind::config, "label_column is empty; name the column that holds the label");
}

// Where a column is absent: which one was asked for, by which option, and which exist.
[[noreturn]] void refuse_missing(const DatasetOptions& options, const nlohmann::json& row, std::int64_t line,
                                 const std::string& column, const char* option) {
  std::vector<std::string> names;
  for (const auto& [name, value] : row.items()) names.push_back(name);
  refuse(options, line,
         fmt::format("no column '{}' (option {}); the columns here are: {}", column, option,
                     names.empty() ? "none" : listed(names)));
}

const std::string& text_of(const DatasetOptions& options, const nlohmann::json& row, std::int64_t line,
                           const std::string& column, const char* option) {
  const auto it = row.find(column);
  if (it == row.end()) refuse_missing(options, row, line, column, option);
  if (!it->is_string())
    refuse(options, line, fmt::format("column '{}' must hold a string, not {}", column, it->type_name()));
  return it->get_ref<const std::string&>();
}

std::vector<std::int32_t> input_ids_of(const DatasetOptions& options, const nlohmann::json& ids, std::int64_t line,
                                       const Tokenizer& tokenizer) {
  const std::int64_t limit = options.num_token_ids > 0 ? options.num_token_ids : tokenizer.vocab_size();
  if (!ids.is_array() || ids.empty()) refuse(options, line, "input_ids must be an array of at least one token id");
  std::vector<std::int32_t> result;
  result.reserve(ids.size());
  for (const nlohmann::json& id : ids) {
    const bool is_valid = id.is_number_integer() && id >= 0 && id < limit;
    if (!is_valid)
      refuse(options, line,
             fmt::format("input_ids[{}] = {} is no token id; they are integers from 0 to {}", result.size(),
                         shortened(id.dump()), limit - 1));
    result.push_back(id.get<std::int32_t>());
  }
  return result;
}

// A label as the file gives it. Canonical decimals only: "007" is a name.
struct RawLabel {
  std::string name;  // decimal for integers
  std::optional<std::int64_t> integer;
  bool is_fraction = false;  // a number that is no integer
};

std::optional<std::int64_t> canonical_integer(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || fmt::format("{}", value) != text) return std::nullopt;
  return value;
}

// "0.5", "1e3". What has digits only and is no canonical integer ("007") is a name.
bool is_fraction(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && std::isfinite(value) &&
         text.find_first_of(".eE") != std::string_view::npos;
}

// Nothing where the row has no label: null, or -1, which unlabelled GLUE files hold.
std::optional<RawLabel> raw_label(const DatasetOptions& options, const nlohmann::json& row, std::int64_t line) {
  const auto it = row.find(options.label_column);
  if (it == row.end()) {
    if (!options.require_labels) return std::nullopt;
    refuse_missing(options, row, line, options.label_column, "label_column");
  }
  if (it->is_null()) {
    if (!options.require_labels) return std::nullopt;
    refuse(options, line, fmt::format("column '{}' is null; every row needs a label here", options.label_column));
  }
  RawLabel label;
  if (it->is_string()) {
    label.name = it->get<std::string>();
    if (has_untyped_fields(options.file)) {
      label.integer = canonical_integer(label.name);
      label.is_fraction = is_fraction(label.name);
    }
  } else if (it->is_number_integer() || it->is_boolean()) {
    label.name = it->dump();
    label.integer = canonical_integer(label.name);
  } else if (it->is_number_float()) {
    label.name = it->dump();
    label.is_fraction = true;
  } else {
    refuse(options, line,
           fmt::format("column '{}' must hold a name or an integer, not {}", options.label_column, it->type_name()));
  }
  if (!options.require_labels && (label.integer == -1 || (has_untyped_fields(options.file) && label.name.empty())))
    return std::nullopt;
  if (label.name.empty()) refuse(options, line, fmt::format("column '{}' is empty", options.label_column));
  return label;
}

class LabelIndex {
 public:
  explicit LabelIndex(const std::vector<std::string>& labels) : labels_(labels) {
    for (std::size_t i = 0; i < labels.size(); ++i) {
      if (!index_.emplace(labels[i], static_cast<std::int32_t>(i)).second)
        fail(ErrorKind::config, fmt::format("label '{}' appears twice in the list of labels", labels[i]));
      has_integer_names_ = has_integer_names_ || canonical_integer(labels[i]).has_value();
    }
  }
  std::optional<std::int32_t> find(const RawLabel& label) const {
    if (const auto it = index_.find(label.name); it != index_.end()) return it->second;
    if (label.integer && !has_integer_names_ && *label.integer >= 0 &&
        *label.integer < static_cast<std::int64_t>(labels_.size()))
      return static_cast<std::int32_t>(*label.integer);
    return std::nullopt;
  }
  std::string unknown(const DatasetOptions& options, const RawLabel& label) const {
    return fmt::format("unknown label '{}' in column '{}'; the known labels are: {}", shortened(label.name),
                       options.label_column, listed(labels_));
  }

 private:
  const std::vector<std::string>& labels_;
  std::unordered_map<std::string, std::int32_t> index_;
  bool has_integer_names_ = false;
};

class ClassificationDataset final : public Dataset {
 public:
  ClassificationDataset(const DatasetOptions& options, const std::vector<std::string>& labels,
                        const Tokenizer& tokenizer)
      : options_(options), tokenizer_(tokenizer) {
    validate(options);
    const LabelIndex index(labels);
    read_rows(
        options.file, [&](nlohmann::json&& row, std::int64_t line) { add(row, line, index); }, options.column_names,
        options.max_rows);
    bytes_.shrink_to_fit();
    rows_.shrink_to_fit();
    const auto lacks_label = [](const Row& row) { return row.label == kNoLabel; };
    const auto num_missing = std::count_if(rows_.begin(), rows_.end(), lacks_label);
    has_labels_ = num_missing == 0;
    if (!first_unknown_.empty())
      log::warn("{}; no label of this file is used", first_unknown_);
    else if (!has_labels_ && num_missing != size())
      log::warn("{}: {} of {} rows have no label, so no label of this file is used", options.file.string(), num_missing,
                size());
  }

  std::int64_t size() const override { return static_cast<std::int64_t>(rows_.size()); }

  Example get(std::int64_t position) const override {
    const Row& row = rows_.at(static_cast<std::size_t>(position));
    Example example;
    const std::string_view text = std::string_view(bytes_).substr(row.offset, row.text_bytes);
    if (row.kind == Kind::ids) {
      example.ids.resize(text.size() / sizeof(std::int32_t));
      std::memcpy(example.ids.data(), text.data(), text.size());
      example.type_ids.assign(example.ids.size(), 0);
    } else {
      std::optional<std::string_view> pair;
      if (row.kind == Kind::pair) pair = std::string_view(bytes_).substr(row.offset + row.text_bytes, row.pair_bytes);
      EncodeOptions encode_options;
      encode_options.max_length = options_.max_length;
      Encoding encoding = tokenizer_.encode(text, pair, encode_options);
      if (encoding.ids.empty()) refuse(options_, row.line, "the text has no tokens; remove the row");
      example.ids = std::move(encoding.ids);
      example.type_ids = std::move(encoding.type_ids);
    }
    if (has_labels_) example.labels.push_back(row.label);
    return example;
  }

 private:
  enum class Kind : std::uint8_t { text, pair, ids };
  struct Row {
    std::uint64_t offset = 0;
    std::uint32_t text_bytes = 0, pair_bytes = 0;
    std::int64_t line = 0;
    std::int32_t label = kNoLabel;
    Kind kind = Kind::text;
  };

  void add(const nlohmann::json& json, std::int64_t line, const LabelIndex& index) {
    Row row;
    row.offset = bytes_.size();
    row.line = line;
    if (const auto ids = json.find(kInputIds);
        ids != json.end() && options_.text_column != kInputIds && !ids->is_string()) {
      add_ids(row, input_ids_of(options_, *ids, line, tokenizer_));
    } else {
      const std::string& text = text_of(options_, json, line, options_.text_column, "text_column");
      bytes_ += text;
      row.text_bytes = static_cast<std::uint32_t>(text.size());
      if (!options_.text_pair_column.empty()) {
        const std::string& pair = text_of(options_, json, line, options_.text_pair_column, "text_pair_column");
        bytes_ += pair;
        row.pair_bytes = static_cast<std::uint32_t>(pair.size());
        row.kind = Kind::pair;
      }
    }
    if (!options_.label_column.empty())
      if (const auto label = raw_label(options_, json, line)) row.label = label_index(*label, line, index);
    rows_.push_back(row);
  }

  std::int32_t label_index(const RawLabel& label, std::int64_t line, const LabelIndex& index) {
    if (const auto found = index.find(label)) return *found;
    if (options_.require_labels) refuse(options_, line, index.unknown(options_, label));
    if (first_unknown_.empty())
      first_unknown_ = fmt::format("{}:{}: {}", options_.file.string(), line, index.unknown(options_, label));
    return kNoLabel;
  }

  void add_ids(Row& row, const std::vector<std::int32_t>& ids) {
    const auto length = static_cast<std::int64_t>(ids.size());
    // Cutting would silently drop the closing special token that the file's author put there.
    if (options_.max_length > 0 && length > options_.max_length)
      refuse(options_, row.line,
             fmt::format("input_ids has {} tokens, more than max_seq_length {}", length, options_.max_length));
    row.kind = Kind::ids;
    row.text_bytes = static_cast<std::uint32_t>(ids.size() * sizeof(std::int32_t));
    bytes_.append(reinterpret_cast<const char*>(ids.data()), row.text_bytes);
  }

  DatasetOptions options_;
  const Tokenizer& tokenizer_;
  std::string bytes_;
  std::vector<Row> rows_;
  std::string first_unknown_;  // the message about the first label that was passed over
  bool has_labels_ = false;
};

class CausalLmDataset final : public Dataset {
 public:
  CausalLmDataset(const DatasetOptions& options, const Tokenizer& tokenizer) {
    validate(options);
    if (options.max_length == 1)
      fail(ErrorKind::config, "max_seq_length = 1 leaves nothing to predict; causal-lm needs at least 2");
    const auto handler = [&](nlohmann::json&& row, std::int64_t line) {
      const auto ids = row.find(kInputIds);
      if (ids != row.end() && options.text_column != kInputIds && !ids->is_string()) {
        add(input_ids_of(options, *ids, line, tokenizer), options, line);
      } else {
        const std::string& text = text_of(options, row, line, options.text_column, "text_column");
        const std::vector<std::int32_t> tokens = tokenizer.encode(text, std::nullopt, EncodeOptions{}).ids;
        check_known(tokens, options, line);
        add(tokens, options, line);
      }
    };
    read_rows(options.file, handler, options.column_names, options.max_rows);
    tokens_.shrink_to_fit();
    if (num_dropped_ > 0)
      log::warn("{}: {} rows or rests of rows have fewer than 2 tokens and were dropped", options.file.string(),
                num_dropped_);
    if (size() == 0)
      fail(ErrorKind::data, fmt::format("{}: no row has the 2 tokens that causal-lm needs", options.file.string()));
  }

  std::int64_t size() const override { return static_cast<std::int64_t>(begins_.size()) - 1; }

  Example get(std::int64_t position) const override {
    const auto index = static_cast<std::size_t>(position);
    const auto first = tokens_.begin() + begins_.at(index), last = tokens_.begin() + begins_.at(index + 1);
    Example example;
    example.ids.assign(first, last);
    example.type_ids.assign(example.ids.size(), 0);
    example.labels.assign(first + 1, last);
    example.labels.push_back(-100);
    return example;
  }

 private:
  static void check_known(const std::vector<std::int32_t>& ids, const DatasetOptions& options, std::int64_t line) {
    const auto largest = std::max_element(ids.begin(), ids.end());
    if (options.num_token_ids > 0 && largest != ids.end() && *largest >= options.num_token_ids)
      refuse(options, line,
             fmt::format("the text has the token id {}, but the model's table has {} rows; tokenizer and model do not "
                         "belong together",
                         *largest, options.num_token_ids));
  }
  void add(const std::vector<std::int32_t>& ids, const DatasetOptions& options, std::int64_t line) {
    const auto total = static_cast<std::int64_t>(ids.size());
    const std::int64_t longest = options.max_length > 0 ? options.max_length : std::max<std::int64_t>(total, 1);
    if (options.one_example_per_row) {
      if (total == 0) refuse(options, line, "the text has no tokens; remove the row");
      if (total > longest)
        refuse(options, line,
               fmt::format("the row has {} tokens, but is needed whole and max_seq_length is {}; split or shorten it",
                           total, longest));
    }
    if (total == 0) ++num_dropped_;
    for (std::int64_t begin = 0; begin < total; begin += longest) {
      const std::int64_t end = std::min(total, begin + longest);
      if (end - begin < 2 && !options.one_example_per_row) {
        ++num_dropped_;
        continue;
      }
      tokens_.insert(tokens_.end(), ids.begin() + begin, ids.begin() + end);
      begins_.push_back(static_cast<std::int64_t>(tokens_.size()));
    }
  }

  std::vector<std::int32_t> tokens_;
  std::vector<std::int64_t> begins_{0};
  std::int64_t num_dropped_ = 0;
};

}  // namespace

std::vector<std::string> collect_labels(const DatasetOptions& options) {
  DatasetOptions labelled = options;
  labelled.require_labels = true;
  validate(labelled);
  std::set<std::string> names;
  bool all_integers = true, all_numbers = true;
  std::int64_t first_fraction_line = 0;
  const auto handler = [&](nlohmann::json&& row, std::int64_t line) {
    const RawLabel label = *raw_label(labelled, row, line);
    all_integers = all_integers && label.integer.has_value();
    all_numbers = all_numbers && (label.integer.has_value() || label.is_fraction);
    if (label.is_fraction && first_fraction_line == 0) first_fraction_line = line;
    names.insert(label.name);
  };
  read_rows(options.file, handler, options.column_names);
  if (all_numbers && !all_integers)
    refuse(options, first_fraction_line,
           fmt::format(
               "column '{}' holds numbers with a fraction, which means regression; text-classification needs names or "
               "integers",
               options.label_column));
  std::vector<std::string> labels(names.begin(), names.end());
  if (all_integers)
    std::sort(labels.begin(), labels.end(),
              [](const std::string& a, const std::string& b) { return *canonical_integer(a) < *canonical_integer(b); });
  return labels;
}

std::unique_ptr<Dataset> make_classification_dataset(const DatasetOptions& options,
                                                     const std::vector<std::string>& labels,
                                                     const Tokenizer& tokenizer) {
  return std::make_unique<ClassificationDataset>(options, labels, tokenizer);
}

std::unique_ptr<Dataset> make_causal_lm_dataset(const DatasetOptions& options, const Tokenizer& tokenizer) {
  return std::make_unique<CausalLmDataset>(options, tokenizer);
}

}  // namespace shardtune
