#include "trainer/observer.hpp"

#include <cmath>
#include <cstdio>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/json.hpp"

namespace shardtune {
namespace {

void append_json(const nlohmann::json& value, std::string& out) {
  if (value.is_number_float()) {
    const double number = value.get<double>();
    out += std::isfinite(number) ? fmt::format("{:.9g}", number) : "null";
  } else if (value.is_object() || value.is_array()) {
    const bool is_object = value.is_object();
    out += is_object ? '{' : '[';
    bool is_first = true;
    for (const auto& [key, item] : value.items()) {
      if (!is_first) out += is_object ? ", " : ",";
      is_first = false;
      if (is_object) out += nlohmann::json(key).dump() + ": ";
      append_json(item, out);
    }
    out += is_object ? '}' : ']';
  } else {
    out += value.dump();
  }
}

class MetricsWriter final : public Observer {
 public:
  MetricsWriter(const std::filesystem::path& output_dir, std::int64_t resumed_step)
      : file_(output_dir / "metrics.jsonl") {
    std::string kept;
    if (resumed_step > 0 && std::filesystem::exists(file_)) {
      const std::string old = read_file(file_);
      for (std::size_t begin = 0; begin < old.size();) {
        const std::size_t end = old.find('\n', begin);
        if (end == std::string::npos) break;  // a line cut off by a kill
        const std::string line = old.substr(begin, end - begin);
        begin = end + 1;
        const auto record = nlohmann::json::parse(line, nullptr, false);
        if (record.is_object() && record.value("step", std::int64_t{0}) <= resumed_step) kept += line + '\n';
      }
    }
    write_file_durably(file_, kept);
    fd_ = UniqueFd(::open(file_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
    if (!fd_) fail(ErrorKind::io, fmt::format("cannot open {} for appending", file_.string()));
  }
  void on_step(const Progress& /*progress*/) override {}
  void on_record(const nlohmann::json& record) override { write_all(fd_.get(), format_json_line(record) + '\n', file_); }

 private:
  std::filesystem::path file_;
  UniqueFd fd_;
};

std::string clock_text(double seconds) {
  const auto total = static_cast<std::int64_t>(std::max(0.0, seconds));
  if (total >= 3600) return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
  return fmt::format("{}:{:02}", total / 60, total % 60);
}

std::string rates(const Progress& p) {
  return fmt::format("{:.1f} samples/s, {:.0f} tokens/s, remaining {}", p.samples_per_second, p.tokens_per_second,
                     clock_text(p.remaining_seconds));
}

class ProgressDisplay final : public Observer {
 public:
  explicit ProgressDisplay(bool is_terminal) : is_terminal_(is_terminal) {}
  ~ProgressDisplay() override {
    if (is_bar_shown_) std::fputc('\n', stderr);
  }
  void on_step(const Progress& progress) override {
    last_ = progress;
    if (!is_terminal_) return;
    constexpr int kWidth = 24;
    const double share = static_cast<double>(progress.step) / static_cast<double>(std::max<std::int64_t>(1, progress.max_steps));
    std::string bar(static_cast<std::size_t>(share * kWidth), '#');
    bar.resize(kWidth, '.');
    fmt::print(stderr, "\r\x1b[K[{}] {}/{} epoch {:.2f} loss {:.4f} {}", bar, progress.step, progress.max_steps,
               progress.epoch, progress.loss, rates(progress));
    std::fflush(stderr);
    is_bar_shown_ = true;
  }
  void on_record(const nlohmann::json& record) override {
    std::string line = fmt::format("step {}/{}", record.value("step", last_.step), last_.max_steps);
    for (const auto& [key, value] : record.items()) {
      if (key == "step" || value.is_array() || value.is_object()) continue;
      if (key == "tokens" || key == "tokens_per_second" || key == "samples_per_second" || key == "step_seconds") continue;
      line += value.is_number_float() ? fmt::format("  {} {:.4g}", key, value.get<double>())
                                      : fmt::format("  {} {}", key, value.dump());
    }
    if (record.contains("loss")) line += "  " + rates(last_);
    fmt::print(stderr, "{}{}\n", is_bar_shown_ ? "\r\x1b[K" : "", line);
    std::fflush(stderr);
    is_bar_shown_ = false;
  }

 private:
  bool is_terminal_;
  bool is_bar_shown_ = false;
  Progress last_;
};

}  // namespace

std::string format_json_line(const nlohmann::json& record) {
  std::string line;
  append_json(record, line);
  return line;
}

std::unique_ptr<Observer> make_metrics_writer(const std::filesystem::path& output_dir, std::int64_t resumed_step) {
  return std::make_unique<MetricsWriter>(output_dir, resumed_step);
}

std::unique_ptr<Observer> make_progress_display(bool is_terminal) { return std::make_unique<ProgressDisplay>(is_terminal); }

}  // namespace shardtune
