/* Paged attention on a CPU, in float32: see paged_attention_native.py. What a row's numbers go
 * through, and in which order, is the same whatever stands beside the row, however its keys are
 * divided and whichever thread computes it. */

#include <omp.h>

#include "attention_tile.h"

/* Vectors of keys that are fetched before they are read. */
#define AHEAD 2

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

/* Rows row .. row + rows - 1 of the `length` of a sequence, one KV head and a share of the keys. */
typedef struct {
    int64_t sequence, start, length, context, row, rows, head, split;
    int fetches;
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

/* Keys of all heads that are soon to be read: side by side, memory has them sooner. */
static void fetch(const Part *part, int64_t begin, int64_t end)
{
    for (int64_t k = begin; k < end; k++)
        for (int64_t d = 0; d < part->key_row; d += 16)
            __builtin_prefetch(part->keys + part->slots[k] * part->key_row + d, 0, 2);
}

/* Queries first .. of a unit, number i being one of row i / group, and which keys of a part they see:
 * no key before `begin`, none from `end` on. */
typedef struct {
    const float *query[TILE];
    float *states[TILE];
    int64_t begins[TILE], ends[TILE], begin, end, from, to;
} Tile;

INLINE Tile tile_of(const int queries, const Attention *a, const Unit *unit, int64_t first,
                    const Part *part)
{
    Tile tile;
    for (int q = 0; q < queries; q++) {
        int64_t row = unit->row + (first + q) / a->group;
        int64_t head = unit->head * a->group + (first + q) % a->group;
        tile.query[q] = a->query + (unit->start + row) * a->query_row + head * a->query_head;
        tile.states[q] = state_of(a, unit, row, head, unit->split);
        tile.begins[q] = most(first_seen(a, unit, row) - part->first, 0);
        tile.ends[q] = least(unit->context - unit->length + row + 1 - part->first, part->most);
    }
    tile.begin = tile.begins[0], tile.end = tile.ends[queries - 1];
    tile.from = tile.begin / LANES * LANES, tile.to = (tile.end + LANES - 1) / LANES * LANES;
    return tile;
}

/* The scores of a tile, minus infinity of keys that others of its queries see. */
INLINE void score(const int queries, const Attention *a, const Tile *tile, const Part *part,
                  int fetches)
{
    for (int64_t k = tile->from; k < tile->to; k += LANES) {
        Vector scores[TILE];
        if (fetches)
            fetch(part, k + AHEAD * LANES, least(k + (AHEAD + 1) * LANES, tile->to));
        dot(queries, tile->query, part, k, a->key_dim, scores);
        UNROLL for (int q = 0; q < queries; q++) {
            Vector scaled = scores[q] * a->scale;
            if (a->softcap)
                scaled = hyperbolic_tangent(scaled / a->softcap) * a->softcap;
            *(Vector *)(part->weights + q * part->most + k) = scaled;
        }
    }
    for (int q = 0; q < queries; q++) {
        float *scores = part->weights + q * part->most;
        for (int64_t k = tile->from; k < least(tile->begins[q], tile->to); k++)
            scores[k] = -INFINITY;
        for (int64_t k = most(tile->ends[q], tile->from); k < tile->to; k++)
            scores[k] = -INFINITY;
    }
}

/* Joins a part of the keys to the states of a tile of queries. */
INLINE void attend_tile(const int queries, const Attention *a, const Unit *unit, int64_t first,
                        const Part *part)
{
    Tile tile = tile_of(queries, a, unit, first, part);
    float kept[TILE], joined[TILE], *columns[TILE];
    if (tile.begin >= tile.end)
        return;
    score(queries, a, &tile, part, unit->fetches && first == 0);
    for (int q = 0; q < queries; q++) {
        float *weights = part->weights + q * part->most + tile.from, largest, sum;
        columns[q] = tile.states[q] + 2;
        if (tile.begins[q] < tile.ends[q]) {
            weigh(weights, tile.to - tile.from, &largest, &sum);
            join(tile.states[q], largest, sum, kept + q, joined + q);
        } else { /* It sees none of them. */
            memset(weights, 0, (tile.to - tile.from) * sizeof(float));
            kept[q] = 1, joined[q] = 0;
        }
    }
    int64_t n = 0, rest = a->value_dim % LANES;
    for (; n + WIDE * LANES <= a->value_dim; n += WIDE * LANES)
        mix(queries, WIDE, 0, columns, n, part, tile.begin, tile.end, kept, joined);
    for (; n + LANES <= a->value_dim; n += LANES)
        mix(queries, 1, 0, columns, n, part, tile.begin, tile.end, kept, joined);
    if (rest)
        mix(queries, 1, rest, columns, n, part, tile.begin, tile.end, kept, joined);
}

static void attend_part(const Attention *a, const Unit *unit, const Part *part)
{
    int64_t queries = unit->rows * a->group, i = 0;
    for (; i + TILE <= queries; i += TILE)
        attend_tile(TILE, a, unit, i, part);
    if (queries - i == 3 && TILE > 3)
        attend_tile(3, a, unit, i, part);
    else if (queries - i == 2 && TILE > 2)
        attend_tile(2, a, unit, i, part);
    else if (queries - i == 1)
        attend_tile(1, a, unit, i, part);
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
    float weights[TILE * a->part];
    Part part = {.most = a->part, .slots = slots, .weights = weights};
    part.keys = a->keys + unit->head * a->key_dim, part.key_row = a->kv_heads * a->key_dim;
    part.values = a->values + unit->head * a->value_dim;
    part.value_row = a->kv_heads * a->value_dim;
    for (int64_t row = unit->row; row < unit->row + unit->rows; row++)
        for (int64_t g = 0; g < a->group; g++) {
            float *state = state_of(a, unit, row, unit->head * a->group + g, unit->split);
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
    int64_t queries = unit->rows * a->group, width = a->value_dim;
    for (int64_t i = 0; i < queries; i++) {
        int64_t row = unit->row + i / a->group, head = unit->head * a->group + i % a->group;
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
static Unit unit_of(const Attention *a, int64_t number, int64_t *sequence)
{
    while (number >= a->units[*sequence + 1] * a->kv_heads)
        ++*sequence;
    int64_t b = *sequence, own = number - a->units[b] * a->kv_heads;
    int64_t block = own / a->kv_heads;
    Unit unit = {.sequence = b, .start = a->starts[b], .context = a->lengths[b]};
    unit.length = a->starts[b + 1] - unit.start;
    unit.row = block / a->splits[b] * a->rows;
    unit.rows = least(a->rows, unit.length - unit.row);
    unit.head = own % a->kv_heads;
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
    int64_t units = a->units[a->sequences] * a->kv_heads;
    /* One thread takes all heads of the same keys, where there is enough for the others. */
    int enough = a->units[a->sequences] >= 4 * omp_get_max_threads();
    int64_t heads = enough ? a->kv_heads : 1;
#pragma omp parallel if (products(a) > PRODUCTS_ALONE)
    {
        int64_t sequence = 0;
#pragma omp for schedule(monotonic : dynamic, heads)
        for (int64_t number = 0; number < units; number++) {
            Unit unit = unit_of(a, number, &sequence);
            unit.fetches = enough && unit.head == 0;
            attend(a, &unit);
        }
        sequence = 0;
#pragma omp for schedule(monotonic : dynamic, heads)
        for (int64_t number = 0; number < units; number++) {
            Unit unit = unit_of(a, number, &sequence);
            if (!unit.split)
                finish(a, &unit);
        }
    }
}
