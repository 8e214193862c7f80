/* Vectors of floats in the machine's widest registers. */

#pragma once

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
