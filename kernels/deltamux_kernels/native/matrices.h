/* Matrices that are found by slot: see by_slot.py, packed.py. */

#pragma once

#include "spans.h"
#include "vectors.h"

/* Floats, or bfloat16 numbers: upper halves of floats whose lower halves are zero. */
typedef struct {
    const void *first;
    int half;
} Numbers;

/* Makes two of what `use` does with numbers, each of which knows their kind as it is compiled. */
#define EITHER(use, numbers)                                                                       \
    do {                                                                                           \
        if ((numbers).half)                                                                        \
            use(((Numbers){(numbers).first, 1}));                                                  \
        else                                                                                       \
            use(((Numbers){(numbers).first, 0}));                                                  \
    } while (0)

/* Offsets of matrices are even; one more says that its numbers are halves. */
INLINE Numbers matrix(const float *arena, int64_t offset)
{
    return (Numbers){arena + (offset & ~(int64_t)1), offset & 1};
}

/* Those that come after so many. */
INLINE Numbers behind(Numbers numbers, int64_t count)
{
    return (Numbers){(const char *)numbers.first + count * (numbers.half ? 2 : 4), numbers.half};
}

typedef struct {
    Vector first, second;
} Two;

/* Two vectors of them. A word of two bfloat16 numbers has the first one in its lower half. */
INLINE Two two(Numbers numbers)
{
    const Vector *vectors = numbers.first;
    Integers low, high, words;
    if (!numbers.half)
        return (Two){vectors[0], vectors[1]};
    memcpy(&words, numbers.first, sizeof words);
    UNROLL for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane / 2 + lane % 2 * LANES;
        high[lane] = low[lane] + LANES / 2;
    }
    Vector even = (Vector)(words << 16), odd = (Vector)(words & ~0xffff);
    return (Two){__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, high)};
}

/* The first `count` numbers of a vector, and zeros behind them. */
INLINE Vector some(Numbers numbers, int64_t count)
{
    Vector halves = {0};
    if (!numbers.half)
        return load(numbers.first, count);
    memcpy(&halves, numbers.first, count * sizeof(uint16_t));
    return two((Numbers){&halves, 1}).first;
}
