/* Matrices that later calls read, fetched while a product does without the memory: see ahead.py. */

#pragma once

#include "matrices.h"

#define LINE 64

/* Those of the spans' slots. */
typedef struct {
    const float *arena;
    const int64_t *offsets;
    const int32_t *ranks;
    int64_t width;
    const Span *spans;
    int64_t count;
} Matrices;

/* What a thread has still to fetch: of `of`, `left` bytes from `begin` in the matrix of `span`, and its
 * part of the `pending` ones from `next` on. Parts are about what threads read in shrink and expand. */
typedef struct {
    int64_t thread, threads;
    const Matrices *next;
    int64_t pending;
    const Matrices *of;
    int64_t span, begin, left;
} Share;

/* Every `step` bytes from `first` on. */
typedef struct {
    const char *first;
    int64_t step;
} Lines;

static int64_t bytes_of(const Matrices *of, int64_t span)
{
    int64_t slot = of->spans[span].slot, numbers = of->ranks[slot] * of->width;
    return numbers * (matrix(of->arena, of->offsets[slot]).half ? 2 : 4);
}

static void enter_next(Share *share)
{
    int64_t total = 0;
    share->pending--, share->of = share->next++;
    for (int64_t span = 0; span < share->of->count; span++)
        total += bytes_of(share->of, span);
    share->span = 0, share->begin = total * share->thread / share->threads;
    share->left = total * (share->thread + 1) / share->threads - share->begin;
}

/* Takes from the share what so many steps of a line at most fetch; where nothing is left, a line that is
 * at hand. */
static Lines next_lines(Share *share, int64_t steps)
{
    while (!share->left) {
        if (!share->pending)
            return (Lines){(const char *)share, 0};
        enter_next(share);
    }
    int64_t size;
    while ((size = bytes_of(share->of, share->span)) <= share->begin)
        share->begin -= size, share->span++;
    const Matrices *of = share->of;
    Numbers numbers = matrix(of->arena, of->offsets[of->spans[share->span].slot]);
    Lines lines = {(const char *)numbers.first + share->begin, 0};
    int64_t some = least(least(size - share->begin, share->left), steps * LINE);
    share->begin += some, share->left -= some;
    lines.step = some / steps;
    return lines;
}
