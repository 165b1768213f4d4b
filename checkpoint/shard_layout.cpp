#include "checkpoint/shard_layout.hpp"

#include <algorithm>
#include <cstdlib>
#include <map>

#include <fmt/format.h>
#include <hdf5.h>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/handle.hpp"

namespace shardtune {
namespace {

template <herr_t (*Close)(hid_t)>
struct HidTraits {
  static hid_t null() noexcept { return -1; }
  static void destroy(hid_t id) noexcept { Close(id); }  // only after a failure; success closes through close_checked
};
using FileId = UniqueHandle<hid_t, HidTraits<H5Fclose>>;
using GroupId = UniqueHandle<hid_t, HidTraits<H5Gclose>>;
using DatasetId = UniqueHandle<hid_t, HidTraits<H5Dclose>>;
using SpaceId = UniqueHandle<hid_t, HidTraits<H5Sclose>>;
using TypeId = UniqueHandle<hid_t, HidTraits<H5Tclose>>;
using AttributeId = UniqueHandle<hid_t, HidTraits<H5Aclose>>;
using PropertiesId = UniqueHandle<hid_t, HidTraits<H5Pclose>>;

// HDF5 prints its error stack by default; ours goes into the Error. The setting belongs to the calling thread.
class SilentErrors {
 public:
  SilentErrors() {
    // After an H5Fclose that failed (full disk), HDF5 1.10 keeps the identifier of a file structure it has freed, and
    // its exit handler crashes on it. Everything is closed here anyway, so the handler is not installed.
    static const herr_t no_exit_handler = H5dont_atexit();
    (void)no_exit_handler;
    H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  ~SilentErrors() { H5Eset_auto2(H5E_DEFAULT, function_, data_); }
  SilentErrors(const SilentErrors&) = delete;
  SilentErrors& operator=(const SilentErrors&) = delete;

 private:
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

// The innermost message of HDF5's stack; of its system errors the reason and what to do about it.
std::string innermost_error() {
  std::string text;
  const auto take_first = [](unsigned, const H5E_error2_t* error, void* into) -> herr_t {
    auto* out = static_cast<std::string*>(into);
    if (out->empty() && error->desc != nullptr) *out = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_first, &text);
  constexpr std::string_view kCode = "errno = ", kReason = "error message = '";
  const std::size_t code = text.find(kCode), begin = text.find(kReason);
  if (code == std::string::npos || begin == std::string::npos) return text.empty() ? "unknown HDF5 error" : text;
  const std::size_t end = text.find('\'', begin + kReason.size());
  return text.substr(begin + kReason.size(), end - begin - kReason.size()) +
         write_advice(std::atoi(text.c_str() + code + kCode.size()));
}

class ShardFile {
 public:
  ShardFile(std::filesystem::path file, const ShardIdentity& identity, bool has_bf16);
  void write_run(const nlohmann::json& run, std::int64_t step);
  // Returns the position of the data in the file.
  std::uint64_t place_slice(const StateSlice& slice, const std::string& dataset_name);
  void close();

 private:
  template <class Code>  // herr_t or hid_t: negative is failure
  Code check(Code code, const char* action) const {
    if (code < 0)
      fail(ErrorKind::io, fmt::format("cannot write {} ({}): {}", file_.string(), action, innermost_error()));
    return code;
  }
  template <class Handle, class Close>
  void close_checked(Handle& handle, Close function, const char* action) const {
    check(function(handle.release()), action);
  }

  void put_attribute(hid_t where, const char* name, hid_t type, std::int64_t count, const void* value) const;
  void put_number(hid_t where, const char* name, std::int64_t value) const;
  void put_text(hid_t where, const char* name, const std::string& text) const;
  TypeId text_type(const std::string& text) const;
  GroupId make_group(hid_t where, const std::string& name) const;
  GroupId& group_of(const std::string& parameter);
  TypeId element_type(const StateSlice& slice) const;

  std::filesystem::path file_;
  FileId id_;
  PropertiesId group_properties_, data_properties_;
  GroupId parameters_;
  std::string current_name_;
  GroupId current_;
};

ShardFile::ShardFile(std::filesystem::path file, const ShardIdentity& identity, bool has_bf16)
    : file_(std::move(file)) {
  PropertiesId access(check(H5Pcreate(H5P_FILE_ACCESS), "H5Pcreate"));
  // One writer, unique names: no lock is needed, and Lustre and NFS often refuse them.
  check(H5Pset_file_locking(access.get(), 0, 1), "H5Pset_file_locking");
  check(H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_V110), "H5Pset_libver_bounds");
  check(H5Pset_fclose_degree(access.get(), H5F_CLOSE_SEMI), "H5Pset_fclose_degree");
  check(H5Pset_meta_block_size(access.get(), 1U << 16), "H5Pset_meta_block_size");
  check(H5Pset_alignment(access.get(), kDataAlignment, kDataAlignment), "H5Pset_alignment");
  // No time stamps, of the root group neither: equal states give equal files.
  PropertiesId creation(check(H5Pcreate(H5P_FILE_CREATE), "H5Pcreate"));
  check(H5Pset_obj_track_times(creation.get(), 0), "H5Pset_obj_track_times");
  id_ = FileId(check(H5Fcreate(file_.c_str(), H5F_ACC_TRUNC, creation.get(), access.get()), "H5Fcreate"));
  close_checked(creation, H5Pclose, "H5Pclose");
  close_checked(access, H5Pclose, "H5Pclose");
  group_properties_ = PropertiesId(check(H5Pcreate(H5P_GROUP_CREATE), "H5Pcreate"));
  check(H5Pset_obj_track_times(group_properties_.get(), 0), "H5Pset_obj_track_times");
  data_properties_ = PropertiesId(check(H5Pcreate(H5P_DATASET_CREATE), "H5Pcreate"));
  check(H5Pset_obj_track_times(data_properties_.get(), 0), "H5Pset_obj_track_times");
  check(H5Pset_layout(data_properties_.get(), H5D_CONTIGUOUS), "H5Pset_layout");
  check(H5Pset_alloc_time(data_properties_.get(), H5D_ALLOC_TIME_EARLY), "H5Pset_alloc_time");
  check(H5Pset_fill_time(data_properties_.get(), H5D_FILL_TIME_NEVER), "H5Pset_fill_time");

  put_text(id_.get(), "format", "shardtune-shard");
  put_number(id_.get(), "version", has_bf16 ? 2 : 1);
  put_number(id_.get(), "rank", identity.rank);
  put_number(id_.get(), "num_ranks", identity.num_ranks);
  parameters_ = make_group(id_.get(), "parameters");
}

void ShardFile::put_attribute(hid_t where, const char* name, hid_t type, std::int64_t count, const void* value) const {
  const auto extent = static_cast<hsize_t>(std::max<std::int64_t>(count, 0));
  SpaceId space(check(count < 0 ? H5Screate(H5S_SCALAR) : H5Screate_simple(1, &extent, nullptr), "H5Screate"));
  AttributeId attribute(check(H5Acreate2(where, name, type, space.get(), H5P_DEFAULT, H5P_DEFAULT), "H5Acreate2"));
  if (extent > 0 || count < 0) check(H5Awrite(attribute.get(), type, value), "H5Awrite");
  close_checked(attribute, H5Aclose, "H5Aclose");
  close_checked(space, H5Sclose, "H5Sclose");
}

void ShardFile::put_number(hid_t where, const char* name, std::int64_t value) const {
  put_attribute(where, name, H5T_STD_I64LE, -1, &value);
}

TypeId ShardFile::text_type(const std::string& text) const {
  TypeId type(check(H5Tcopy(H5T_C_S1), "H5Tcopy"));
  check(H5Tset_size(type.get(), std::max<std::size_t>(text.size(), 1)), "H5Tset_size");
  check(H5Tset_strpad(type.get(), H5T_STR_NULLPAD), "H5Tset_strpad");
  check(H5Tset_cset(type.get(), H5T_CSET_UTF8), "H5Tset_cset");
  return type;
}

void ShardFile::put_text(hid_t where, const char* name, const std::string& text) const {
  TypeId type = text_type(text);
  put_attribute(where, name, type.get(), -1, text.c_str());
  close_checked(type, H5Tclose, "H5Tclose");
}

GroupId ShardFile::make_group(hid_t where, const std::string& name) const {
  return GroupId(
      check(H5Gcreate2(where, name.c_str(), H5P_DEFAULT, group_properties_.get(), H5P_DEFAULT), "H5Gcreate2"));
}

void ShardFile::write_run(const nlohmann::json& run, std::int64_t step) {
  GroupId group = make_group(id_.get(), "run");
  put_number(group.get(), "step", step);
  const std::string text = run.dump();
  TypeId type = text_type(text);
  SpaceId space(check(H5Screate(H5S_SCALAR), "H5Screate"));
  DatasetId dataset(
      check(H5Dcreate2(group.get(), "json", type.get(), space.get(), H5P_DEFAULT, data_properties_.get(), H5P_DEFAULT),
            "H5Dcreate2"));
  check(H5Dwrite(dataset.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, text.c_str()), "H5Dwrite");
  close_checked(dataset, H5Dclose, "H5Dclose");
  close_checked(space, H5Sclose, "H5Sclose");
  close_checked(type, H5Tclose, "H5Tclose");
  close_checked(group, H5Gclose, "H5Gclose");
}

// '/' separates groups in HDF5 and "." means the group itself; the attribute `parameter` keeps the true name.
std::string link_name(const std::string& name) {
  std::string out;
  for (const char c : name) {
    if (c == '/')
      out += "%2F";
    else if (c == '%')
      out += "%25";
    else
      out += c;
  }
  return out == "." ? "%2E" : out;
}

GroupId& ShardFile::group_of(const std::string& parameter) {
  if (current_ && current_name_ == parameter) return current_;
  if (current_) close_checked(current_, H5Gclose, "H5Gclose");
  const std::string link = link_name(parameter);
  const htri_t exists = check(H5Lexists(parameters_.get(), link.c_str(), H5P_DEFAULT), "H5Lexists");
  current_ = exists > 0 ? GroupId(check(H5Gopen2(parameters_.get(), link.c_str(), H5P_DEFAULT), "H5Gopen2"))
                        : make_group(parameters_.get(), link);
  current_name_ = parameter;
  return current_;
}

// HDF5 1.10 has no name for bf16 but can describe it: the sign, 8 bits of exponent and 7 of mantissa, as the upper half
// of an fp32. Its own conversion would round ties up; here only the layout is written, never an element.
TypeId ShardFile::element_type(const StateSlice& slice) const {
  TypeId type(check(H5Tcopy(H5T_IEEE_F32LE), "H5Tcopy"));
  if (slice.data.scalar_type() == at::kBFloat16) {
    check(H5Tset_fields(type.get(), 15, 7, 8, 0, 7), "H5Tset_fields");
    check(H5Tset_size(type.get(), 2), "H5Tset_size");
    check(H5Tset_ebias(type.get(), 127), "H5Tset_ebias");
  }
  return type;
}

std::uint64_t ShardFile::place_slice(const StateSlice& slice, const std::string& dataset_name) {
  const hid_t group = group_of(slice.name).get();
  const auto numel = static_cast<hsize_t>(slice.data.numel());
  SpaceId space(check(H5Screate_simple(1, &numel, nullptr), "H5Screate_simple"));
  TypeId type = element_type(slice);
  DatasetId dataset(check(H5Dcreate2(group, dataset_name.c_str(), type.get(), space.get(), H5P_DEFAULT,
                                     data_properties_.get(), H5P_DEFAULT),
                          "H5Dcreate2"));
  close_checked(type, H5Tclose, "H5Tclose");
  put_text(dataset.get(), "parameter", slice.name);
  put_attribute(dataset.get(), "global_shape", H5T_STD_I64LE, static_cast<std::int64_t>(slice.global_shape.size()),
                slice.global_shape.data());
  put_number(dataset.get(), "offset", slice.offset);
  put_number(dataset.get(), "numel", slice.data.numel());
  put_text(dataset.get(), "dtype", dtype_name(slice.data.scalar_type()));
  const haddr_t address = H5Dget_offset(dataset.get());
  if (address == HADDR_UNDEF)
    fail(ErrorKind::io, fmt::format("cannot write {} (H5Dget_offset): {}", file_.string(), innermost_error()));
  close_checked(dataset, H5Dclose, "H5Dclose");
  close_checked(space, H5Sclose, "H5Sclose");
  return address;
}

void ShardFile::close() {
  if (current_) close_checked(current_, H5Gclose, "H5Gclose");
  close_checked(parameters_, H5Gclose, "H5Gclose");
  close_checked(group_properties_, H5Pclose, "H5Pclose");
  close_checked(data_properties_, H5Pclose, "H5Pclose");
  check(H5Fflush(id_.get(), H5F_SCOPE_LOCAL), "H5Fflush");
  close_checked(id_, H5Fclose, "H5Fclose");
}

}  // namespace

std::string ShardIdentity::file_name() const { return fmt::format("shard-{:05d}-of-{:05d}.h5", rank, num_ranks); }

std::vector<std::uint64_t> lay_out_shard(const std::filesystem::path& path, const ShardIdentity& identity,
                                         const StateView& view) {
  const SilentErrors silence;
  const bool has_bf16 = std::any_of(view.slices.begin(), view.slices.end(), [](const StateSlice& slice) {
    return slice.data.numel() > 0 && slice.data.scalar_type() == at::kBFloat16;
  });
  ShardFile file(path, identity, has_bf16);
  file.write_run(view.run, identity.step);
  std::map<std::pair<std::string, std::string>, int> pieces;
  std::vector<std::uint64_t> positions;
  for (const StateSlice& slice : view.slices) {
    if (slice.data.numel() == 0) {
      positions.push_back(0);
      continue;
    }
    const int piece = pieces[{slice.name, slice.field}]++;
    positions.push_back(file.place_slice(slice, piece == 0 ? slice.field : fmt::format("{}.{}", slice.field, piece)));
  }
  file.close();
  return positions;
}

}  // namespace shardtune
