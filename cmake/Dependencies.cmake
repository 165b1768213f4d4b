# Every third-party library as an imported target, so that a folder's CMakeLists names what it uses and nothing else leaks in.

# LibTorch out of the PyPI wheel. Own imported targets: find_package(Torch) drags in libtorch_cuda and wrong run paths.
# The environment wins over what an earlier configuration has stored.
set(libtorch_default $ENV{LIBTORCH_DIR})
if(libtorch_default)
  set(LIBTORCH_DIR ${libtorch_default} CACHE PATH "prefix with torch/lib and torch/include" FORCE)
elseif(DEFINED ENV{XDG_CACHE_HOME})
  set(libtorch_default $ENV{XDG_CACHE_HOME}/shardtune/libtorch-2.11.0)
else()
  set(libtorch_default $ENV{HOME}/.cache/shardtune/libtorch-2.11.0)
endif()
set(LIBTORCH_DIR ${libtorch_default} CACHE PATH "prefix with torch/lib and torch/include")
# A wheel prefix has torch/{lib,include}; a LibTorch archive has {lib,include} directly.
if(EXISTS ${LIBTORCH_DIR}/torch/lib/libtorch_cpu.so)
  set(torch_root ${LIBTORCH_DIR}/torch)
elseif(EXISTS ${LIBTORCH_DIR}/lib/libtorch_cpu.so)
  set(torch_root ${LIBTORCH_DIR})
else()
  message(FATAL_ERROR "LibTorch not found in '${LIBTORCH_DIR}'. Run scripts/bootstrap, or set LIBTORCH_DIR to a LibTorch 2.11.0.")
endif()

foreach(lib c10 torch_cpu)
  add_library(torch::${lib} SHARED IMPORTED)
  set_target_properties(torch::${lib} PROPERTIES
    IMPORTED_LOCATION ${torch_root}/lib/lib${lib}.so IMPORTED_SONAME lib${lib}.so)
endforeach()
add_library(shardtune_torch INTERFACE)
# -idirafter: the wheel ships its own fmt, which must not shadow the fmt that Debian's spdlog was built with.
target_compile_options(shardtune_torch INTERFACE
  "SHELL:-idirafter ${torch_root}/include"
  "SHELL:-idirafter ${torch_root}/include/torch/csrc/api/include" $<$<CXX_COMPILER_ID:GNU>:-fopenmp>)  # clang would want its own OpenMP
file(GLOB gomp ${torch_root}/lib/libgomp*.so*)
list(GET gomp 0 gomp)
target_link_libraries(shardtune_torch INTERFACE torch::torch_cpu torch::c10 ${gomp})
target_link_options(shardtune_torch INTERFACE -Wl,-rpath,${torch_root}/lib)

find_package(MPI REQUIRED COMPONENTS C)
add_library(shardtune_mpi INTERFACE)
target_link_libraries(shardtune_mpi INTERFACE MPI::MPI_C)
target_compile_definitions(shardtune_mpi INTERFACE OMPI_SKIP_MPICXX=1)

find_package(PkgConfig REQUIRED)
find_package(HDF5 REQUIRED COMPONENTS C)
add_library(shardtune_hdf5 INTERFACE)
target_include_directories(shardtune_hdf5 SYSTEM INTERFACE ${HDF5_C_INCLUDE_DIRS})
target_link_libraries(shardtune_hdf5 INTERFACE ${HDF5_C_LIBRARIES})

find_package(Boost REQUIRED COMPONENTS program_options)
find_package(spdlog REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(Threads REQUIRED)
pkg_check_modules(pcre2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(utf8proc REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(xxhash REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(zstd REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(fmt REQUIRED IMPORTED_TARGET fmt)
