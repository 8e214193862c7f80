/* Paged attention on a CPU, in float32: see paged_attention_native.py. What a row's numbers go
 * through, and in which order, is the same whatever stands beside the row, however its keys are
 * divided and whichever thread computes it. */

#include <omp.h>

#include "attention_tile.h"

/* Tiles that meet the same few keys one after the other. */
#define TOGETHER 16

/* As paged_attention_native.py fills it in, all but what is a layer's own. */
typedef struct {
    const float *query, *keys, *values, *sinks;
    float *out, *states;
    const int32_t *starts, *lengths, *tables;
    /* Of each sequence: among how many its keys are divided, and the units and states before. */
    const int64_t *splits, *units, *firsts;
    int64_t sequences, table_row, block_size, rows, part, window;
    int64_t query_row, query_head, kv_heads, group, key_dim, value_dim;
    float scale, softcap;
} Attention;

/* Rows row .. row + rows - 1 of the `length` of a sequence, `heads` KV heads and a share of the keys. */
typedef struct {
    int64_t sequence, start, length, context, row, rows, head, heads, split;
} Unit;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static float *state_of(const Attention *a, const Unit *unit, int64_t row, int64_t head, int64_t split)
{
    int64_t before = a->firsts[unit->sequence] + split * unit->length + row;
    return a->states + (before * a->kv_heads * a->group + head) * (a->value_dim + 2);
}

/* The first key that a row sees. */
static int64_t first_seen(const Attention *a, const Unit *unit, int64_t row)
{
    return a->window ? most(unit->context - unit->length + row - a->window + 1, 0) : 0;
}

/* The next vector of keys, or their values, which memory is to bring meanwhile. */
INLINE void fetch(const float *cache, int64_t row, int64_t dim, const Part *part, int64_t first)
{
    for (int64_t k = first; k < first + LANES; k++)
        for (int64_t d = 0; d < dim; d += 16)
            __builtin_prefetch(cache + part->slots[k] * row + d, 0, 2);
}

/* Queries first .. of KV head number `head` of a unit; number i is one of row i / group. */
static void set_tile(Tile *tile, const Attention *a, const Unit *unit, int64_t head, int64_t first,
                     const Part *part)
{
    tile->queries = least(unit->rows * a->group - first, TILE);
    tile->leads = first == 0;
    tile->keys = a->keys + head * a->key_dim, tile->values = a->values + head * a->value_dim;
    for (int q = 0; q < tile->queries; q++) {
        int64_t row = unit->row + (first + q) / a->group;
        int64_t own = head * a->group + (first + q) % a->group;
        tile->query[q] = a->query + (unit->start + row) * a->query_row + own * a->query_head;
        tile->states[q] = state_of(a, unit, row, own, unit->split);
        tile->begins[q] = most(first_seen(a, unit, row) - part->first, 0);
        tile->ends[q] = least(unit->context - unit->length + row + 1 - part->first, part->most);
    }
    tile->begin = tile->begins[0], tile->end = tile->ends[tile->queries - 1];
    tile->from = tile->begin / LANES * LANES, tile->to = (tile->end + LANES - 1) / LANES * LANES;
}

/* The scores of a vector of keys. */
INLINE void score(const int queries, const Attention *a, const Tile *tile, const Part *part,
                  int64_t k)
{
    Vector scores[TILE];
    dot(queries, tile, part, k, a->key_dim, scores);
    UNROLL for (int q = 0; q < queries; q++) {
        Vector scaled = scores[q] * a->scale;
        if (a->softcap)
            scaled = hyperbolic_tangent(scaled / a->softcap) * a->softcap;
        *(Vector *)(tile->weights + q * part->most + k) = scaled;
    }
}

/* Scores into weights, of which a query has none for keys that others of its tile see. */
static void weigh_tile(Tile *tile, const Part *part)
{
    for (int q = 0; q < tile->queries; q++) {
        float *scores = tile->weights + q * part->most, largest, sum;
        for (int64_t k = tile->from; k < least(tile->begins[q], tile->to); k++)
            scores[k] = -INFINITY;
        for (int64_t k = most(tile->ends[q], tile->from); k < tile->to; k++)
            scores[k] = -INFINITY;
        if (tile->begins[q] >= tile->ends[q]) { /* It sees none of them. */
            memset(scores + tile->from, 0, (tile->to - tile->from) * sizeof(float));
            tile->kept[q] = 1, tile->joined[q] = 0;
            continue;
        }
        weigh(scores + tile->from, tile->to - tile->from, &largest, &sum);
        join(tile->states[q], largest, sum, tile->kept + q, tile->joined + q);
    }
}

/* The weighted values of some keys. */
INLINE void mix_all(const int queries, const Attention *a, const Tile *tile, const Part *part,
                    int64_t begin, int64_t end)
{
    int64_t n = 0, dim = a->value_dim;
    for (; n + WIDE * LANES <= dim; n += WIDE * LANES)
        mix(queries, WIDE, 0, tile, part, begin, end, n, dim);
    for (; n + LANES <= dim; n += LANES)
        mix(queries, 1, 0, tile, part, begin, end, n, dim);
    if (n < dim)
        mix(queries, 1, dim - n, tile, part, begin, end, n, dim);
}

/* Of so many queries, each with code of its own. */
#define BY_QUERIES(call)                                                                           \
    do {                                                                                           \
        if (tile->queries == TILE)                                                                 \
            call(TILE);                                                                            \
        else if (TILE > 3 && tile->queries == 3)                                                   \
            call(3);                                                                               \
        else if (TILE > 2 && tile->queries == 2)                                                   \
            call(2);                                                                               \
        else                                                                                       \
            call(1);                                                                               \
    } while (0)

/* The scores of the keys from .. to - 1. */
static void score_tiles(const Attention *a, const Tile *tiles, int count, const Part *part,
                        int64_t from, int64_t to)
{
    for (int64_t k = from; k < to; k += LANES)
        for (const Tile *tile = tiles; tile < tiles + count; tile++) {
            if (tile->leads && k + LANES < to)
                fetch(tile->keys, part->key_row, a->key_dim, part, k + LANES);
            else if (tile->leads)
                fetch(tile->values, part->value_row, a->value_dim, part, from);
#define SCORE(queries) score(queries, a, tile, part, k)
            if (tile->from <= k && k < tile->to)
                BY_QUERIES(SCORE);
        }
}

/* The weighted values of the same keys. */
static void mix_tiles(const Attention *a, const Tile *tiles, int count, const Part *part,
                      int64_t from, int64_t to)
{
    for (int64_t k = from; k < to; k += LANES)
        for (const Tile *tile = tiles; tile < tiles + count; tile++) {
            int64_t begin = most(k, tile->begin), end = least(k + LANES, tile->end);
            if (tile->leads && k + LANES < to)
                fetch(tile->values, part->value_row, a->value_dim, part, k + LANES);
#define MIX(queries) mix_all(queries, a, tile, part, begin, end)
            if (begin < end)
                BY_QUERIES(MIX);
        }
}

/* Joins a part of the keys to the states of some tiles. */
static void attend_tiles(const Attention *a, Tile *tiles, int count, const Part *part)
{
    int64_t from = part->most, to = 0, dim = a->value_dim;
    for (const Tile *tile = tiles; tile < tiles + count; tile++)
        if (tile->from < tile->to)
            from = least(from, tile->from), to = most(to, tile->to);
    score_tiles(a, tiles, count, part, from, to);
    for (Tile *tile = tiles; tile < tiles + count; tile++) {
        weigh_tile(tile, part);
        memset(tile->sums, 0, tile->queries * dim * sizeof(float));
    }
    mix_tiles(a, tiles, count, part, from, to);
    for (const Tile *tile = tiles; tile < tiles + count; tile++)
        for (int q = 0; q < tile->queries; q++) {
            float *state = tile->states[q] + 2, kept = tile->kept[q], joined = tile->joined[q];
            for (int64_t n = 0; n < dim; n++)
                state[n] = state[n] * kept + tile->sums[q * dim + n] * joined;
        }
}

/* Joins a part of the keys to the states of a unit. */
static void attend_part(const Attention *a, const Unit *unit, const Part *part)
{
    Tile tiles[TOGETHER];
    float weights[TOGETHER][TILE * part->most], sums[TOGETHER][TILE * a->value_dim];
    int64_t each = (unit->rows * a->group + TILE - 1) / TILE, all = unit->heads * each;
    for (int64_t first = 0; first < all; first += TOGETHER) {
        int count = least(all - first, TOGETHER);
        for (int i = 0; i < count; i++) {
            int64_t head = unit->head + (first + i) / each, number = (first + i) % each;
            set_tile(tiles + i, a, unit, head, number * TILE, part);
            tiles[i].weights = weights[i], tiles[i].sums = sums[i];
        }
        attend_tiles(a, tiles, count, part);
    }
}

/* Where the keys begin .. end - 1 of a part are. Others of their vectors stand for one of them. */
static void find(const Attention *a, const Unit *unit, const Part *part, int64_t begin, int64_t end)
{
    const int32_t *table = a->tables + unit->sequence * a->table_row;
    for (int64_t k = begin; k < end;) {
        int64_t place = part->first + k, block = place / a->block_size;
        int64_t next = least((block + 1) * a->block_size - part->first, end);
        for (int64_t slot = table[block] * a->block_size + place % a->block_size; k < next; k++)
            part->slots[k] = slot++;
    }
    for (int64_t k = begin / LANES * LANES; k < begin; k++)
        part->slots[k] = part->slots[begin];
    for (int64_t k = end; k % LANES; k++)
        part->slots[k] = part->slots[end - 1];
}

/* The states of a unit's queries over its share of the keys. */
static void attend(const Attention *a, const Unit *unit)
{
    int64_t slots[a->part];
    Part part = {.most = a->part, .slots = slots};
    part.key_row = a->kv_heads * a->key_dim, part.value_row = a->kv_heads * a->value_dim;
    for (int64_t row = unit->row; row < unit->row + unit->rows; row++)
        for (int64_t i = 0; i < unit->heads * a->group; i++) {
            float *state = state_of(a, unit, row, unit->head * a->group + i, unit->split);
            memset(state, 0, (a->value_dim + 2) * sizeof(float));
            state[0] = -INFINITY;
        }
    int64_t before = first_seen(a, unit, 0) / a->part, splits = a->splits[unit->sequence];
    int64_t parts = (unit->context + a->part - 1) / a->part - before;
    int64_t last = before + parts * (unit->split + 1) / splits;
    int64_t seen = first_seen(a, unit, unit->row);
    int64_t beyond = unit->context - unit->length + unit->row + unit->rows;
    for (int64_t number = before + parts * unit->split / splits; number < last; number++) {
        part.first = number * a->part;
        int64_t begin = most(seen - part.first, 0), end = least(beyond - part.first, a->part);
        if (begin < end) {
            find(a, unit, &part, begin, end);
            attend_part(a, unit, &part);
        }
    }
}

/* The outputs of a unit's queries, of all shares of their keys. */
static void finish(const Attention *a, const Unit *unit)
{
    int64_t heads = unit->heads * a->group, width = a->value_dim;
    for (int64_t i = 0; i < unit->rows * heads; i++) {
        int64_t row = unit->row + i / heads, head = unit->head * a->group + i % heads;
        float *out = a->out + ((unit->start + row) * a->kv_heads * a->group + head) * width;
        float whole[2] = {-INFINITY, 0}, kept = 1, joined;
        memset(out, 0, width * sizeof(float));
        for (int64_t split = 0; split < a->splits[unit->sequence]; split++) {
            const float *state = state_of(a, unit, row, head, split);
            if (state[1] == 0)
                continue; /* It sees none of these keys. */
            join(whole, state[0], state[1], &kept, &joined);
            for (int64_t n = 0; n < width; n++)
                out[n] = out[n] * kept + state[2 + n] * joined;
        }
        kept = 1;
        if (a->sinks)
            join(whole, a->sinks[head], 1, &kept, &joined);
        for (int64_t n = 0; n < width; n++)
            out[n] = out[n] * kept / whole[1];
    }
}

/* `sequence` is that of a unit before. */
static Unit unit_of(const Attention *a, int64_t number, int64_t heads, int64_t *sequence)
{
    int64_t each = a->kv_heads / heads;
    while (number >= a->units[*sequence + 1] * each)
        ++*sequence;
    int64_t b = *sequence, own = number - a->units[b] * each, block = own / each;
    Unit unit = {.sequence = b, .start = a->starts[b], .context = a->lengths[b]};
    unit.length = a->starts[b + 1] - unit.start;
    unit.row = block / a->splits[b] * a->rows;
    unit.rows = least(a->rows, unit.length - unit.row);
    unit.head = own % each * heads, unit.heads = heads;
    unit.split = block % a->splits[b];
    return unit;
}

/* At most as many as all rows and the keys of their sequences make. */
static int64_t products(const Attention *a)
{
    int64_t scores = 0;
    for (int64_t b = 0; b < a->sequences; b++)
        scores += (a->starts[b + 1] - a->starts[b]) * (int64_t)a->lengths[b];
    return scores * a->kv_heads * a->group * (a->key_dim + a->value_dim);
}

void attention(const Attention *step, const float *query, const float *keys, const float *values,
               const float *sinks, float *out)
{
    Attention own = *step;
    own.query = query, own.keys = keys, own.values = values, own.sinks = sinks, own.out = out;
    const Attention *a = &own;
    /* One thread takes all heads of the same keys, where there is enough for the others. */
    int64_t blocks = a->units[a->sequences];
    int64_t heads = blocks >= 4 * omp_get_max_threads() ? a->kv_heads : 1;
    int64_t units = blocks * (a->kv_heads / heads);
#pragma omp parallel if (products(a) > PRODUCTS_ALONE)
    {
        int64_t sequence = 0;
#pragma omp for schedule(monotonic : dynamic)
        for (int64_t number = 0; number < units; number++) {
            Unit unit = unit_of(a, number, heads, &sequence);
            attend(a, &unit);
        }
        sequence = 0;
#pragma omp for schedule(monotonic : dynamic)
        for (int64_t number = 0; number < units; number++) {
            Unit unit = unit_of(a, number, heads, &sequence);
            if (!unit.split)
                finish(a, &unit);
        }
    }
}
