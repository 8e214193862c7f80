/* Operations of the other files, one after the other: see runs.py. */

#include <stdint.h>

/* Whatever an operation takes, each of its arguments is a word; it leaves those that it has not. */
#define WORDS 16

typedef struct {
    void (*operation)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
    int64_t words[WORDS];
} Call;

void run(const Call *calls, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const int64_t *w = calls[i].words;
        calls[i].operation(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11],
                           w[12], w[13], w[14], w[15]);
    }
}
