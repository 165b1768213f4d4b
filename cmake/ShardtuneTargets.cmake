add_library(shardtune_warnings INTERFACE)
target_compile_options(shardtune_warnings INTERFACE -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Werror=return-type)
target_include_directories(shardtune_warnings INTERFACE ${CMAKE_SOURCE_DIR})

# One precompiled header for everything that uses LibTorch; sources still include what they use (SHARDTUNE_PCH=OFF proves it).
if(SHARDTUNE_PCH)
  file(WRITE ${CMAKE_BINARY_DIR}/pch/pch.cpp "// carries the precompiled header\n")
  add_library(shardtune_pch OBJECT ${CMAKE_BINARY_DIR}/pch/pch.cpp)
  target_link_libraries(shardtune_pch PRIVATE shardtune_warnings shardtune_torch)
  target_precompile_headers(shardtune_pch PRIVATE
    <ATen/ATen.h> <torch/csrc/autograd/custom_function.h> <torch/csrc/autograd/engine.h>)
endif()

# shardtune_add_library(core TORCH PUBLIC core... PRIVATE ...): one library per folder, all *.cpp beside the CMakeLists.
function(shardtune_add_library name)
  cmake_parse_arguments(arg "TORCH" "" "PUBLIC;PRIVATE" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cpp)
  add_library(shardtune_${name} STATIC ${sources})
  target_link_libraries(shardtune_${name} PUBLIC ${arg_PUBLIC} PRIVATE shardtune_warnings ${arg_PRIVATE})
  target_include_directories(shardtune_${name} PUBLIC ${CMAKE_SOURCE_DIR})
  if(arg_TORCH)
    target_link_libraries(shardtune_${name} PUBLIC shardtune_torch)
    if(SHARDTUNE_PCH)
      target_precompile_headers(shardtune_${name} REUSE_FROM shardtune_pch)
    endif()
  endif()
endfunction()
