// Compiles a hot function for several instruction sets, of which the loader picks one.
//
// The build defines FASTVOL_HAS_TARGET_CLONES where compiler and loader can do that. The versions
// give the same bits: the build also forbids contraction to fused multiply-adds.
#pragma once

#ifdef FASTVOL_HAS_TARGET_CLONES
#define FASTVOL_VERSIONS \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTVOL_VERSIONS
#endif
