#include "tests/fault/crash_model.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "core/file.hpp"

namespace shardtune {
namespace {

namespace fs = std::filesystem;
constexpr std::size_t kAbsent = ~std::size_t{0};
constexpr std::size_t kSector = 512;

// Loses a part of a write: all, all but a run of sectors, or leaves zeros where it would have extended the file.
void lose_part(std::string& content, const std::string& before, std::uint64_t offset, std::size_t size,
               std::mt19937& random) {
  const std::size_t first = offset / kSector, last = (offset + size + kSector - 1) / kSector;
  const std::size_t from = first + random() % (last - first), to = from + 1 + random() % (last - from);
  const std::size_t begin = std::max<std::size_t>(offset, from * kSector), end = std::min(offset + size, to * kSector);
  for (std::size_t at = begin; at < end; ++at) content[at] = at < before.size() ? before[at] : '\0';
}

}  // namespace

std::vector<IoRecord> read_io_log(const fs::path& file) {
  const std::string log = read_file(file);
  std::vector<IoRecord> records;
  for (std::size_t at = 0; at < log.size();) {
    IoRecordHeader header{};
    std::memcpy(&header, log.data() + at, sizeof(header));
    at += sizeof(header);
    IoRecord record{header.operation, log.substr(at, header.a_bytes), log.substr(at + header.a_bytes, header.b_bytes),
                    header.offset, log.substr(at + header.a_bytes + header.b_bytes, header.data_bytes)};
    at += header.a_bytes + header.b_bytes + header.data_bytes;
    records.push_back(std::move(record));
  }
  return records;
}

CrashModel::CrashModel(fs::path root) : root_(std::move(root)) { load(root_); }

std::size_t CrashModel::load(const fs::path& path) {
  const std::size_t index = nodes_.size();
  nodes_.emplace_back();
  if (!fs::is_directory(path)) {
    nodes_[index].durable = nodes_[index].current = read_file(path);
    return index;
  }
  nodes_[index].is_directory = true;
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::size_t child = load(entry.path());
    nodes_[index].durable_entries[entry.path().filename()] = child;
  }
  nodes_[index].current_entries = nodes_[index].durable_entries;
  return index;
}

std::size_t CrashModel::find(const fs::path& path) const {
  std::size_t node = 0;
  const fs::path relative = path.lexically_relative(root_);
  for (const fs::path& part : relative) {
    if (part == ".") continue;
    const auto it = nodes_[node].current_entries.find(part.string());
    if (it == nodes_[node].current_entries.end()) return kAbsent;
    node = it->second;
  }
  return node;
}

std::size_t CrashModel::parent_of(const fs::path& path) const {
  const std::size_t parent = find(path.parent_path());
  if (parent == kAbsent)
    throw std::runtime_error("the log changes something in an unknown directory: " + path.string());
  return parent;
}

void CrashModel::apply_change(Entries& entries, const Change& change) {
  if (change.operation == IoOperation::remove) {
    entries.erase(change.name);
  } else if (change.operation == IoOperation::rename) {
    const auto it = entries.find(change.name);
    if (it == entries.end()) return;  // what would be renamed was lost
    const std::size_t node = it->second;
    entries.erase(it);
    entries[change.target] = node;
  } else {
    entries[change.name] = change.node;
  }
}

void CrashModel::apply_change(std::string& content, const Change& change) {
  if (change.operation == IoOperation::truncate) {
    content.resize(change.offset);
    return;
  }
  if (content.size() < change.offset + change.data.size()) content.resize(change.offset + change.data.size());
  content.replace(change.offset, change.data.size(), change.data);
}

void CrashModel::apply_to_names(const IoRecord& record) {
  const fs::path path = record.a;
  Change change{record.operation, path.filename(), fs::path(record.b).filename(), 0, "", 0};
  if (record.operation == IoOperation::create || record.operation == IoOperation::make_directory) {
    change.node = nodes_.size();
    nodes_.emplace_back();
    nodes_.back().is_directory = record.operation == IoOperation::make_directory;
  }
  Node& parent = nodes_[parent_of(path)];
  apply_change(parent.current_entries, change);
  parent.pending.push_back(std::move(change));
}

void CrashModel::apply(const IoRecord& record) {
  const std::size_t index = find(record.a);
  if (record.operation == IoOperation::rename || record.operation == IoOperation::remove ||
      record.operation == IoOperation::make_directory ||
      (record.operation == IoOperation::create && index == kAbsent)) {
    apply_to_names(record);
    return;
  }
  if (index == kAbsent) throw std::runtime_error("the log changes an unknown file: " + record.a);
  Node& node = nodes_[index];
  if (record.operation == IoOperation::sync) {
    node.durable = node.current;
    node.durable_entries = node.current_entries;
    node.pending.clear();
    return;
  }
  Change change{record.operation, "", "", record.offset, record.data, 0};
  if (record.operation == IoOperation::create) {
    if (record.offset == 0) return;  // opened as it is
    change.operation = IoOperation::truncate;
    change.offset = 0;
  }
  apply_change(node.current, change);
  node.pending.push_back(std::move(change));
}

void CrashModel::write_node(std::size_t index, std::mt19937& random, const fs::path& into) const {
  const Node& node = nodes_[index];
  const bool loses_by_age = random() % 2 == 0;
  const std::size_t num_kept = random() % (node.pending.size() + 1);
  if (node.is_directory) {
    Entries entries = node.durable_entries;
    for (std::size_t i = 0; i < node.pending.size(); ++i)
      if (loses_by_age ? i < num_kept : random() % 2 == 0) apply_change(entries, node.pending[i]);
    fs::create_directories(into);
    for (const auto& [name, child] : entries) write_node(child, random, into / name);
    return;
  }
  std::string content = node.durable;
  for (std::size_t i = 0; i < node.pending.size(); ++i) {
    const Change& change = node.pending[i];
    if (loses_by_age ? i >= num_kept : random() % 2 != 0) continue;
    const std::string before = content;
    apply_change(content, change);
    if (change.operation == IoOperation::write && random() % 3 == 0)
      lose_part(content, before, change.offset, change.data.size(), random);
  }
  std::ofstream(into, std::ios::binary) << content;
}

void CrashModel::write_state(std::mt19937& random, const fs::path& into) const { write_node(0, random, into); }

}  // namespace shardtune
