// Included in a program before its sources: counts the calls of operator new that the program's own
// code makes, and prints their number at its end where COUNT_NEWS is set.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

inline size_t news = 0;

inline const bool is_counting =
    std::getenv("COUNT_NEWS") && !std::atexit([] { std::fprintf(stderr, "%zu news\n", news); });

void* operator new(size_t size) {
  Dl_info here, caller;
  if (is_counting && dladdr(&news, &here) && dladdr(__builtin_return_address(0), &caller)) {
    news += std::strcmp(here.dli_fname, caller.dli_fname) == 0;
  }
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
