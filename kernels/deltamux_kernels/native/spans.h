/* Which rows of a step belong to which slot. */

#pragma once

#include <stdint.h>

/* Rows start .. start + rows - 1 have the adapter in `slot`, and meet its matrix [ranks[slot], width]
 * at arena + offsets[slot]. */
typedef struct {
    int32_t slot, start, rows;
} Span;
