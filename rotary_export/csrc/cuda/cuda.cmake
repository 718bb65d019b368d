# The CUDA kernel: nvcc compiles rotary_kernel.cu to device code alone. cuda_driver.cc embeds it and
# the NVIDIA driver loads it at the first launch. So the build does not need CMake's CUDA language, a
# CUDA runtime or a host compiler that nvcc supports, and the library loads without a driver.
if(NOT ROTARY_EXPORT_CUDA)
  return()
endif()
find_program(ROTARY_EXPORT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
             PATH_SUFFIXES bin)
if(NOT ROTARY_EXPORT_NVCC)
  message(STATUS "rotary_export: nvcc not found, hence no CUDA kernel")
  return()
endif()

# Machine code for the data-centre GPUs that this nvcc supports, and PTX of the newest, which the
# driver compiles for later GPUs. GPUs before 8.0 have no conversion to bfloat16.
execute_process(COMMAND ${ROTARY_EXPORT_NVCC} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
set(targets "")
foreach(arch 80 90 100)
  if(known MATCHES "sm_${arch}[^0-9]")
    list(APPEND targets -gencode "arch=compute_${arch},code=sm_${arch}")
    set(newest ${arch})
  endif()
endforeach()
if(NOT targets)
  message(STATUS "rotary_export: no CUDA kernel, ${ROTARY_EXPORT_NVCC} supports no GPU from sm_80 on")
  return()
endif()
list(APPEND targets -gencode "arch=compute_${newest},code=compute_${newest}")

# A tenth of the size, in versions that have the option.
execute_process(COMMAND ${ROTARY_EXPORT_NVCC} --help OUTPUT_VARIABLE help ERROR_QUIET)
set(compression "")
if(help MATCHES "--compress-mode")
  set(compression --compress-mode=size)
endif()

set(warnings "")
if(ROTARY_EXPORT_WERROR)
  set(warnings -Werror all-warnings)
endif()

# tests/csrc/test_cuda_build.py compiles with the same flags and reads the report of ptxas.
set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/rotary_kernel.fatbin)
add_custom_command(
  OUTPUT ${fatbin}
  COMMAND
    ${ROTARY_EXPORT_NVCC} -fatbin -std=c++17 -O3 -fmad=false -ftz=false -prec-div=true
    -allow-unsupported-compiler ${warnings} ${compression} ${targets} -I${CMAKE_CURRENT_SOURCE_DIR}
    ${CMAKE_CURRENT_SOURCE_DIR}/cuda/rotary_kernel.cu -o ${fatbin}
  DEPENDS cuda/rotary_kernel.cu cuda/rotate_thread.h cuda/launch_plan.h kernel/rotary_kernel.h
          kernel/element_types.h rotary_export.h
  COMMENT "Compiling rotary_kernel.cu"
  VERBATIM)

target_sources(rotary_export PRIVATE cuda/cuda_driver.cc cuda/launch_rotation.cc cuda/launch_plan.cc
                                     ort/rotary_cuda_op.cc)
set_source_files_properties(
  cuda/cuda_driver.cc PROPERTIES OBJECT_DEPENDS ${fatbin}
                                 COMPILE_DEFINITIONS ROTARY_EXPORT_FATBIN="${fatbin}")
target_compile_definitions(rotary_export PRIVATE ROTARY_EXPORT_HAS_CUDA)
target_link_libraries(rotary_export PRIVATE ${CMAKE_DL_LIBS})
