// Included before isa_dispatch.cc by the compiler's option -include: replaces the processor's own
// list of features by that of kernel_dispatch.cc.
#ifndef ROTARY_EXPORT_TESTS_KERNEL_DISPATCH_CPU_H_
#define ROTARY_EXPORT_TESTS_KERNEL_DISPATCH_CPU_H_

#include <cpuid.h>

#include <cstdlib>

int FakeCpuSupports(const char* feature);

inline int FakeGetCpuid(unsigned, unsigned*, unsigned*, unsigned* ecx, unsigned*) {
  *ecx = FakeCpuSupports("f16c") != 0 ? bit_F16C : 0;
  return 1;
}

#define __builtin_cpu_supports FakeCpuSupports
#define __get_cpuid FakeGetCpuid

#endif  // ROTARY_EXPORT_TESTS_KERNEL_DISPATCH_CPU_H_
