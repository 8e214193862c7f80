/* What a few queries and some keys of one KV head make: see attention.c. */

#pragma once

#include <math.h>

#include "vectors.h"

/* Queries that are computed together, by WIDE keys or by WIDE vectors of a value: the sums fill the
 * registers. */
#ifdef __AVX512F__
#define TILE 4
#else
#define TILE 2
#endif
#define WIDE 4

/* Keys of a sequence from number `first` on, at most `most`, and the places in the cache where they
 * and their values are. */
typedef struct {
    int64_t first, most, *slots, key_row, value_row;
} Part;

/* Queries of one KV head, and which keys of a part they see: no key before `begin`, none from `end`
 * on. `from` and `to` are these in whole vectors. */
typedef struct {
    int queries, leads; /* the first ones of their head */
    const float *query[TILE], *keys, *values;
    float *states[TILE], *weights; /* [TILE, most] */
    float *sums;                   /* [TILE, value_dim] */
    float kept[TILE], joined[TILE];
    int64_t begins[TILE], ends[TILE], begin, end, from, to;
} Tile;

#if LANES == 16
#define EACH(lane, h)                                                                              \
    lane(0, h), lane(1, h), lane(2, h), lane(3, h), lane(4, h), lane(5, h), lane(6, h),            \
        lane(7, h), lane(8, h), lane(9, h), lane(10, h), lane(11, h), lane(12, h), lane(13, h),    \
        lane(14, h), lane(15, h)
#else
#define EACH(lane, h)                                                                              \
    lane(0, h), lane(1, h), lane(2, h), lane(3, h), lane(4, h), lane(5, h), lane(6, h), lane(7, h)
#endif
#ifdef __clang__
#define SHUFFLE(a, b, lane, h) __builtin_shufflevector(a, b, EACH(lane, h))
#else
#define SHUFFLE(a, b, lane, h) __builtin_shuffle(a, b, (Integers){EACH(lane, h)})
#endif
/* Sums of two lanes each, whose numbers differ by h: of b where a lane's number has h, else of a. */
#define OWN(i, h) ((i) & (h) ? LANES + (i) : (i))
#define OTHER(i, h) ((i) & (h) ? LANES + ((i) ^ (h)) : (i) ^ (h))
#define PAIRS(a, b, h) (SHUFFLE(a, b, OWN, h) + SHUFFLE(a, b, OTHER, h))

/* scores[q], lane by lane, is the query q times one of LANES keys. */
INLINE void dot(const int queries, const Tile *tile, const Part *part, int64_t first, int64_t dim,
                Vector *scores)
{
    Vector some[TILE][LANES / WIDE];
    for (int n = 0; n < LANES / WIDE; n++) {
        const float *key[WIDE];
        Vector sums[TILE][WIDE] = {0};
        int64_t d = 0;
        UNROLL for (int k = 0; k < WIDE; k++)
            key[k] = tile->keys + part->slots[first + n * WIDE + k] * part->key_row;
        for (; d + LANES <= dim; d += LANES)
            UNROLL for (int q = 0; q < queries; q++)
                UNROLL for (int k = 0; k < WIDE; k++)
                    sums[q][k] += *(const Vector *)(tile->query[q] + d) * *(const Vector *)(key[k] + d);
        if (d < dim)
            UNROLL for (int q = 0; q < queries; q++)
                UNROLL for (int k = 0; k < WIDE; k++)
                    sums[q][k] += load(tile->query[q] + d, dim - d) * load(key[k] + d, dim - d);
        UNROLL for (int q = 0; q < queries; q++)
            some[q][n] = PAIRS(PAIRS(sums[q][0], sums[q][1], 1),
                               PAIRS(sums[q][2], sums[q][3], 1), 2);
    }
    UNROLL for (int q = 0; q < queries; q++) {
#if LANES == 16
        scores[q] = PAIRS(PAIRS(some[q][0], some[q][1], 4), PAIRS(some[q][2], some[q][3], 4), 8);
#else
        scores[q] = PAIRS(some[q][0], some[q][1], 4);
#endif
    }
}

/* Beyond 1 by its formula, below it by Lambert's fraction. */
static Vector hyperbolic_tangent(Vector x)
{
    Vector s = x * x;
    Vector small = x * (((s + 378.0f) * s + 17325.0f) * s + 135135.0f) /
                   (((s * 28.0f + 3150.0f) * s + 62370.0f) * s + 135135.0f);
    return select(s < 1.0f, small, 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f));
}

/* A state is the largest of some scores s, the sum of exp(s - largest), and the values so weighted.
 * Joins others to it, but for the values: those of both are to be multiplied by kept and joined. */
static void join(float *state, float largest, float sum, float *kept, float *joined)
{
    float top = state[0] > largest ? state[0] : largest;
    Vector factors = exponential((Vector){state[0] - top, largest - top});
    *kept = factors[0], *joined = factors[1];
    state[0] = top;
    state[1] = state[1] * *kept + sum * *joined;
}

/* Scores, in place, into weights of a state of their own. */
static void weigh(float *scores, int64_t count, float *largest, float *sum)
{
    Vector top = *(Vector *)scores, sums = {0};
    for (int64_t k = LANES; k < count; k += LANES) {
        Vector next = *(Vector *)(scores + k);
        top = select(next > top, next, top);
    }
    for (int lane = 1; lane < LANES; lane++)
        top[0] = top[lane] > top[0] ? top[lane] : top[0];
    for (int64_t k = 0; k < count; k += LANES) {
        Vector weights = exponential(*(Vector *)(scores + k) - top[0]);
        *(Vector *)(scores + k) = weights;
        sums += weights;
    }
    *largest = top[0], *sum = total(sums);
}

/* Some columns of the sums, `wide` vectors or the last `rest`: the weighted values of the keys
 * begin .. end - 1 are added. */
INLINE void mix(const int queries, const int wide, int64_t rest, const Tile *tile,
                const Part *part, int64_t begin, int64_t end, int64_t first, int64_t dim)
{
    Vector sums[TILE][WIDE];
    UNROLL for (int q = 0; q < queries; q++)
        UNROLL for (int i = 0; i < wide; i++) {
            const float *place = tile->sums + q * dim + first + i * LANES;
            sums[q][i] = rest ? load(place, rest) : *(const Vector *)place;
        }
    for (int64_t k = begin; k < end; k++) {
        const float *value = tile->values + part->slots[k] * part->value_row + first;
        UNROLL for (int i = 0; i < wide; i++) {
            Vector piece = rest ? load(value, rest) : *(const Vector *)(value + i * LANES);
            UNROLL for (int q = 0; q < queries; q++)
                sums[q][i] += tile->weights[q * part->most + k] * piece;
        }
    }
    UNROLL for (int q = 0; q < queries; q++)
        UNROLL for (int i = 0; i < wide; i++) {
            float *place = tile->sums + q * dim + first + i * LANES;
            if (rest)
                store(place, sums[q][i], rest);
            else
                *(Vector *)place = sums[q][i];
        }
}
