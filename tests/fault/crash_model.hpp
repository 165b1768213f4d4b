#pragma once
// A model of a file system that loses power: what is on the disk for certain (synced) and what may or may not be.
#include <cstdint>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tests/fault/io_record.hpp"

namespace shardtune {

struct IoRecord {
  IoOperation operation;
  std::string a, b;
  std::uint64_t offset = 0;
  std::string data;
};
std::vector<IoRecord> read_io_log(const std::filesystem::path& file);

// Pessimistic, as POSIX allows: a file's writes since its last sync may be lost, torn at sectors of 512 bytes, or
// replaced by zeros, independently of each other; a directory's changes since its last sync may be lost, in order of
// their age or not; syncing a file says nothing about its name.
class CrashModel {
 public:
  // All that is in `root` now is durable.
  explicit CrashModel(std::filesystem::path root);
  void apply(const IoRecord& record);
  // Writes a state that a power loss now may leave into the empty directory `into`.
  void write_state(std::mt19937& random, const std::filesystem::path& into) const;

 private:
  struct Change {  // of a file: bytes at an offset, or a length; of a directory: see below
    IoOperation operation;
    std::string name, target;
    std::uint64_t offset = 0;
    std::string data;
    std::size_t node = 0;
  };
  using Entries = std::map<std::string, std::size_t>;
  struct Node {
    bool is_directory = false;
    std::string durable, current;              // a file's content
    Entries durable_entries, current_entries;  // a directory's
    std::vector<Change> pending;
  };
  std::size_t load(const std::filesystem::path& path);
  std::size_t find(const std::filesystem::path& path) const;  // npos when it is not there
  std::size_t parent_of(const std::filesystem::path& path) const;
  void apply_to_names(const IoRecord& record);
  static void apply_change(Entries& entries, const Change& change);
  static void apply_change(std::string& content, const Change& change);
  void write_node(std::size_t node, std::mt19937& random, const std::filesystem::path& into) const;

  std::filesystem::path root_;
  std::vector<Node> nodes_;  // nodes_[0] is root_
};

}  // namespace shardtune
