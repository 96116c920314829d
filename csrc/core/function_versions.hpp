// Compiles a hot function for several instruction sets and picks one when the library is loaded.
#pragma once

#include <cstdlib>  // defines __GLIBC__, whose loader the choice rests on

#if defined(__has_attribute) && defined(__x86_64__) && defined(__linux__) && \
    defined(__GLIBC__) && !defined(FASTVOL_SANITIZE)
// The sanitizers start after the loader has made the choice.
#if __has_attribute(target_clones)
#define FASTVOL_VERSIONS \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif

#ifndef FASTVOL_VERSIONS
#define FASTVOL_VERSIONS
#endif
