/* write_kv on a CPU, in float32: see write_kv.py. */

#include "vectors.h"

/* Rows of the heads of keys or of values. */
typedef struct {
    const float *from;
    int64_t row, head, dim;
    float *cache;
} Rows;

static void write_row(const Rows *rows, int64_t t, int64_t heads, int64_t slot)
{
    for (int64_t h = 0; h < heads; h++)
        memcpy(rows->cache + (slot * heads + h) * rows->dim,
               rows->from + t * rows->row + h * rows->head, rows->dim * sizeof(float));
}

/* 0, and nothing is written, where a slot is none of the cache's. */
int64_t write_kv(const float *key, int64_t key_row, int64_t key_head, int64_t key_dim,
                 float *key_cache, const float *value, int64_t value_row, int64_t value_head,
                 int64_t value_dim, float *value_cache, const int64_t *slots, int64_t count,
                 int64_t heads, int64_t most)
{
    const Rows keys = {key, key_row, key_head, key_dim, key_cache};
    const Rows values = {value, value_row, value_head, value_dim, value_cache};
    for (int64_t t = 0; t < count; t++)
        if (slots[t] >= most)
            return 0;
#pragma omp parallel for if (count * heads * (key_dim + value_dim) > ALONE)
    for (int64_t t = 0; t < count; t++)
        if (slots[t] >= 0) {
            write_row(&keys, t, heads, slots[t]);
            write_row(&values, t, heads, slots[t]);
        }
    return 1;
}
